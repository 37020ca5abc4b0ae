"""Shapes of models that are measured, by name: what a checkpoint of random weights needs to know, and no weights."""

from dataclasses import dataclass, fields
from typing import Final

from engine.model_config import ModelConfig
from kernels.rope import Rope

BOS_TOKEN_ID: Final = 1
EOS_TOKEN_ID: Final = 2
ROPE_THETA: Final = 500_000.0
RMS_NORM_EPS: Final = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one Llama model. Its head is its embedding (tied)."""

    vocab_size: int = 32_000
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 4096

    def model_config(self) -> ModelConfig:
        """The same as the engine reads it."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=RMS_NORM_EPS,
            rope=Rope(ROPE_THETA),
            max_position_embeddings=self.max_positions,
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
            eos_token_ids=(EOS_TOKEN_ID,),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The products of one layer as the engine computes them: name to (inputs, outputs)."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (self.hidden_size, query + 2 * kv),
            "o": (query, self.hidden_size),
            "gate_up": (self.hidden_size, 2 * self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
        }

    @property
    def layer_weights(self) -> int:
        """Weights in the linear layers of all layers, the head aside."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def head_weights(self) -> int:
        """Weights of the embedding, which is the head."""
        return self.vocab_size * self.hidden_size

    def decode_bytes(self, *, layer_weight_bytes: int) -> int:
        """Bytes of weights that one decode step reads; the head is bfloat16 whatever the layers are."""
        return self.layer_weights * layer_weight_bytes + self.head_weights * 2

    def prefill_flops(self, num_tokens: int) -> int:
        """Floating-point operations of a prompt: the layers' products, causal attention, the head for the last row."""
        query = self.num_heads * self.head_dim
        attention = self.num_layers * 4 * query * (num_tokens * (num_tokens + 1) // 2)
        return 2 * self.layer_weights * num_tokens + attention + 2 * self.head_weights


SHAPES: Final[dict[str, ModelShape]] = {
    "tiny": ModelShape(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    ),
    "0.5b": ModelShape(
        hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128
    ),
    "llama-1b": ModelShape(
        hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64
    ),
    "llama-8b-layer": ModelShape(
        hidden_size=4096, intermediate_size=14_336, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128
    ),
}
"""0.5b is the shape that servers are compared on; llama-8b-layer is one layer of the 8B model, for kernels."""

SIZE_NAMES: Final = tuple(field.name for field in fields(ModelShape))
"""What can be overruled one by one."""
