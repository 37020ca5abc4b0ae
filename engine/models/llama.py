"""The Llama architecture and nothing else: which tensors it has, and how a step goes through them.

It is written in a backend's operations over flat token rows; it knows no requests, no blocks beyond the pages it passes
on, and no sampling.
"""

from collections.abc import Iterator, Mapping, Sequence
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


_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head"
_INPUT_NORM, _POST_ATTENTION_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
_LINEARS = ("qkv", "o", "gate_up", "down")


def plain_tensors(config: ModelConfig) -> tuple[str, ...]:
    """The tensors that the model uses as they are stored, by checkpoint name."""
    layers = [
        f"{_prefix(layer)}.{norm}" for layer in range(config.num_layers) for norm in (_INPUT_NORM, _POST_ATTENTION_NORM)
    ]
    return (_EMBEDDING, *layers, _NORM)


def prepare_linears(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    backend: Backend,
    *,
    layers_stored: WeightFormat = WeightFormat.AS_GIVEN,
) -> Iterator[tuple[str, Linear]]:
    """Prepares the model's linear layers one after the other, each with its name; keeps none, nor any of `weights`.

    Linear layers that are int8 have their `…weight_scale` beside them, as `engine.compressed_tensors` declares.
    `layers_stored` says how the layers' linear weights are multiplied; the head's are always as given.
    """
    for prefix in map(_prefix, range(config.num_layers)):
        for name in _LINEARS:
            yield f"{prefix}.{name}", _prepare(name, weights, prefix, backend, layers_stored)
    yield _HEAD, backend.prepare_head(weights[_EMBEDDING if config.tie_word_embeddings else f"{_HEAD}.weight"])


class Llama:
    """One model's weights and the way through them. Immutable after construction; writes only the pages it is given."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], linears: Mapping[str, Linear], backend: Backend
    ) -> None:
        """Takes `tensors` as `plain_tensors` names them, all of one dtype, and `linears` as `prepare_linears` does."""
        self._config = config
        self._embedding = tensors[_EMBEDDING]
        self._layers = [
            _Layer(
                input_norm=tensors[f"{prefix}.{_INPUT_NORM}"],
                qkv=linears[f"{prefix}.qkv"],
                o=linears[f"{prefix}.o"],
                post_attention_norm=tensors[f"{prefix}.{_POST_ATTENTION_NORM}"],
                gate_up=linears[f"{prefix}.gate_up"],
                down=linears[f"{prefix}.down"],
            )
            for prefix in map(_prefix, range(config.num_layers))
        ]
        self._norm = tensors[_NORM]
        self._head = linears[_HEAD]
        # [max_position_embeddings, head_dim / 2], float32
        self._cosines, self._sines = backend.rope_tables(
            config.rope, head_dim=config.head_dim, num_positions=config.max_position_embeddings
        )

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        backend: Backend,
        *,
        layers_stored: WeightFormat = WeightFormat.AS_GIVEN,
    ) -> "Llama":
        """The model of `weights` as `tensor_shapes` names them; see `prepare_linears`."""
        linears = prepare_linears(config, weights, backend, layers_stored=layers_stored)
        return cls(config, {name: weights[name] for name in plain_tensors(config)}, dict(linears), backend)

    @property
    def dtype(self) -> torch.dtype:
        """What rows between layers, keys and values are."""
        return self._embedding.dtype

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
        return ops.linear(self._head, drawn, dtype=torch.float32), scored

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores every token for rows after the last norm: [rows, vocab_size], float32 and not rounded to less."""
        return self._head(hidden, dtype=torch.float32)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}"


def _prepare(name: str, weights: Mapping[str, Tensor], prefix: str, backend: Backend, stored: WeightFormat) -> Linear:
    """One of a layer's `_LINEARS`."""

    def linear(name: str) -> tuple[Tensor, Tensor | None]:
        return weights[f"{prefix}.{name}.weight"], weights.get(f"{prefix}.{name}.bias")

    def scales(name: str) -> Tensor | None:
        found = weights.get(f"{prefix}.{name}.weight_scale")
        return None if found is None else found.flatten()

    if name == "qkv":
        projections = [f"self_attn.{each}_proj" for each in name]
        joined, biases = zip(*map(linear, projections), strict=True)
        scale = _join([scales(each) for each in projections])
        return backend.prepare_linear(torch.cat(joined), _join(biases), stored=stored, scales=scale)
    if name == "gate_up":
        gate, up = scales("mlp.gate_proj"), scales("mlp.up_proj")
        both = None if gate is None or up is None else (gate, up)
        return backend.prepare_gated_linear(linear("mlp.gate_proj"), linear("mlp.up_proj"), stored=stored, scales=both)
    full_name = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}[name]
    return backend.prepare_linear(*linear(full_name), stored=stored, scales=scales(full_name))


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One after the other; None where there are none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
