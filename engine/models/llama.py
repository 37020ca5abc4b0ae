"""The Llama architecture and nothing else: which tensors it has, and how a step goes through them.

It is written in a backend's operations over flat token rows; it knows no requests, no blocks beyond the pages it passes
on, and no sampling.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from kernels.backend import Backend, Batch, Linear, Operations, Rotation, WeightFormat


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its checkpoint name: exactly these, with exactly these shapes."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (kv, hidden, config.attention_bias),
        "self_attn.v_proj": (kv, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.attention_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for prefix in (f"model.layers.{layer}" for layer in range(config.num_layers)):
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
    return shapes


class _Layer(NamedTuple):
    input_norm: Tensor  # [hidden]
    qkv: Linear
    o: Linear
    post_attention_norm: Tensor  # [hidden]
    gate_up: Linear
    down: Linear


class Llama:
    """One model's weights and the way through them. Immutable after construction; writes only the pages it is given."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        backend: Backend,
        *,
        layers_stored: WeightFormat = WeightFormat.AS_GIVEN,
    ) -> None:
        """Takes `weights` as `tensor_shapes` names them, all of one dtype; linear layers are kept as the backend packs.

        Linear layers that are int8 have their `…weight_scale` beside them, as `engine.compressed_tensors` declares.

        `layers_stored` says how the layers' linear weights are multiplied; the head's are always as given.
        """
        self._config = config
        self._embedding = weights["model.embed_tokens.weight"]
        self._layers = [
            _layer(weights, f"model.layers.{layer}", backend, layers_stored) for layer in range(config.num_layers)
        ]
        self._norm = weights["model.norm.weight"]
        self._head = backend.prepare_linear(
            self._embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        )
        # [max_position_embeddings, head_dim / 2], float32
        self._cosines, self._sines = backend.rope_tables(
            config.rope, head_dim=config.head_dim, num_positions=config.max_position_embeddings
        )

    def forward(self, ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Computes all rows of `batch` and writes their keys and values into `pages`: a `kernels.backend.Definition`.

        `ops` are the backend's that the weights were packed for, or take notes for it. pages: [num_blocks,
        num_kv_heads, num_layers, 2, block_size, head_dim]. Returns the logits of the rows that are drawn from,
        [num_drawn, vocab_size], as `logits` makes them, and the rows that are scored, [num_scored, hidden_size], after
        the last norm.
        """
        config, eps = self._config, self._config.rms_norm_eps
        slots, spans, rotation = batch.slots, batch.spans, Rotation(self._cosines, self._sines, batch.positions)
        num_heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

        def attend(index: int, hidden: Tensor) -> Tensor:
            layer = self._layers[index]
            qkv = ops.linear(layer.qkv, ops.rms_norm(hidden, layer.input_norm, eps))
            q, k, v = torch.split(qkv.view(len(qkv), -1, config.head_dim), num_heads, dim=1)
            q = ops.rotate_and_write(q, (k, v), rotation, pages=pages, layer=index, slots=slots)
            return ops.paged_attention(q, pages, spans, layer=index, scale=config.attention_scale).flatten(1)

        def add(index: int, attended: Tensor, hidden: Tensor) -> Tensor:
            layer = self._layers[index]
            hidden = ops.linear(layer.o, attended, residual=hidden)
            inner = ops.linear(layer.gate_up, ops.rms_norm(hidden, layer.post_attention_norm, eps))
            return ops.linear(layer.down, inner, residual=hidden)

        hidden, last = ops.embedding(batch.token_ids, self._embedding), config.num_layers - 1
        for index in range(last):
            hidden = add(index, attend(index, hidden), hidden)
        # After the last layer's keys and values are written, only rows that something is asked of are computed.
        attended = attend(last, hidden)
        drawn, scored = (
            ops.rms_norm(add(last, ops.take_rows(attended, rows), ops.take_rows(hidden, rows)), self._norm, eps)
            for rows in (batch.drawn_rows, batch.scored_rows)
        )
        return ops.linear(self._head, ops.widen(drawn)), scored

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores every token for rows after the last norm: [rows, vocab_size], float32 and not rounded to less."""
        return self._head(hidden.float())


def _layer(weights: Mapping[str, Tensor], prefix: str, backend: Backend, stored: WeightFormat) -> _Layer:
    def linear(name: str) -> tuple[Tensor, Tensor | None]:
        return weights[f"{prefix}.{name}.weight"], weights.get(f"{prefix}.{name}.bias")

    def scales(name: str) -> Tensor | None:
        found = weights.get(f"{prefix}.{name}.weight_scale")
        return None if found is None else found.flatten()

    def prepare(name: str) -> Linear:
        return backend.prepare_linear(*linear(name), stored=stored, scales=scales(name))

    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    qkv, biases = zip(*map(linear, projections), strict=True)
    gate, up = scales("mlp.gate_proj"), scales("mlp.up_proj")
    return _Layer(
        input_norm=weights[f"{prefix}.input_layernorm.weight"],
        qkv=backend.prepare_linear(
            torch.cat(qkv), _join(biases), stored=stored, scales=_join([scales(name) for name in projections])
        ),
        o=prepare("self_attn.o_proj"),
        post_attention_norm=weights[f"{prefix}.post_attention_layernorm.weight"],
        gate_up=backend.prepare_gated_linear(
            linear("mlp.gate_proj"),
            linear("mlp.up_proj"),
            stored=stored,
            scales=None if gate is None or up is None else (gate, up),
        ),
        down=prepare("mlp.down_proj"),
    )


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One after the other; None where there are none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
