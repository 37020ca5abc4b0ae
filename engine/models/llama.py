"""The Llama architecture and nothing else: which tensors it has, and how a step goes through them.

It is written in a backend's operations over flat token rows; it knows no requests, no blocks beyond the pages it passes
on, and no sampling.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from engine.batch import Batch
from engine.model_config import ModelConfig
from kernels.backend import Backend


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


class _Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class _Layer(NamedTuple):
    input_norm: Tensor  # [hidden]
    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    post_attention_norm: Tensor  # [hidden]
    gate: _Linear
    up: _Linear
    down: _Linear


class Llama:
    """One model's weights and the way through them. Immutable after construction; writes only the pages it is given."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], backend: Backend) -> None:
        """Takes `weights` as `tensor_shapes` names them, all of one dtype; keeps them, without copying."""
        self._config = config
        self._ops = backend
        self._embedding = weights["model.embed_tokens.weight"]
        self._layers = [_layer(weights, f"model.layers.{layer}") for layer in range(config.num_layers)]
        self._norm = weights["model.norm.weight"]
        self._head = self._embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        # [max_position_embeddings, head_dim / 2], float32
        self._cos, self._sin = backend.rope_tables(
            config.rope, head_dim=config.head_dim, num_positions=config.max_position_embeddings
        )

    def forward(self, batch: Batch, pages: Tensor) -> Tensor:
        """Computes all rows of `batch`, writes their keys and values into `pages`, returns the rows that sample.

        pages: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]. Returns [num_sampled, hidden_size],
        after the last norm.
        """
        ops, eps = self._ops, self._config.rms_norm_eps
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        hidden = ops.embedding(batch.token_ids, self._embedding)
        update = hidden.new_zeros(hidden.shape)
        for index, layer in enumerate(self._layers):
            normed, hidden = ops.add_rms_norm(update, hidden, layer.input_norm, eps)
            q, k, v = (self._heads(normed, projection) for projection in (layer.q, layer.k, layer.v))
            q, k = ops.apply_rope(q, cos, sin), ops.apply_rope(k, cos, sin)
            ops.write_kv(k, v, pages, layer=index, slots=batch.slots)
            attended = ops.paged_attention(q, pages, batch.spans, layer=index, scale=self._config.attention_scale)
            update = ops.linear(attended.flatten(1), *layer.o)
            normed, hidden = ops.add_rms_norm(update, hidden, layer.post_attention_norm, eps)
            inner = ops.silu_mul(ops.linear(normed, *layer.gate), ops.linear(normed, *layer.up))
            update = ops.linear(inner, *layer.down)
        rows = batch.sample_rows
        return ops.add_rms_norm(update[rows], hidden[rows], self._norm, eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores every token for rows that `forward` returned: [rows, vocab_size], float32."""
        return self._ops.linear(hidden, self._head).float()

    def _heads(self, x: Tensor, projection: _Linear) -> Tensor:
        """Projects rows [num_tokens, hidden_size] into heads [num_tokens, heads, head_dim]."""
        return self._ops.linear(x, *projection).view(len(x), -1, self._config.head_dim)


def _layer(weights: Mapping[str, Tensor], prefix: str) -> _Layer:
    def linear(name: str) -> _Linear:
        return _Linear(weights[f"{prefix}.{name}.weight"], weights.get(f"{prefix}.{name}.bias"))

    return _Layer(
        input_norm=weights[f"{prefix}.input_layernorm.weight"],
        q=linear("self_attn.q_proj"),
        k=linear("self_attn.k_proj"),
        v=linear("self_attn.v_proj"),
        o=linear("self_attn.o_proj"),
        post_attention_norm=weights[f"{prefix}.post_attention_layernorm.weight"],
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
