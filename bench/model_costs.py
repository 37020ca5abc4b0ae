"""What one model asks of a machine, whatever serves it: bytes of weights for a decode step, operations for a prompt.

From a model directory, or from a shape. It never reads a weight: the headers of the files tell the bytes.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Self

from bench.safetensors_stream import tensor_sizes
from bench.shapes import ModelShape
from engine.compressed_tensors import Compression
from engine.model_config import ModelConfig
from staffetta.identity import weight_names

_EMBEDDING: Final = "model.embed_tokens.weight"


class Arithmetic(Enum):
    """In what a model's linear layers are computed."""

    BF16 = "bf16"
    INT8 = "int8"
    """8-bit integers times 8-bit integers."""

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 2 if self is Arithmetic.BF16 else 1


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """One model's. `decode_bytes` are those of the weights that a decode step reads, the embedding only as a head."""

    shape: ModelShape
    arithmetic: Arithmetic
    decode_bytes: int

    @classmethod
    def from_shape(cls, shape: ModelShape, arithmetic: Arithmetic) -> Self:
        """Linear layers and head alone, without norms and scales."""
        return cls(shape, arithmetic, shape.decode_bytes(layer_weight_bytes=arithmetic.weight_bytes))

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """Every tensor that the files hold. Raises ModelNotFoundError or ModelRefusedError, as loading it would."""
        config = ModelConfig.from_directory(directory)
        shape = ModelShape(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_positions=config.max_position_embeddings,
        )
        arithmetic = Arithmetic.INT8 if config.compression is Compression.W8A8 else Arithmetic.BF16
        sizes: dict[str, int] = {}
        for name in weight_names(directory):
            sizes |= tensor_sizes(directory / name)
        unread = 0 if config.tie_word_embeddings else sizes[_EMBEDDING]
        return cls(shape, arithmetic, sum(sizes.values()) - unread)

    def prefill_flops(self, num_tokens: int) -> int:
        """Operations of a prompt: the layers' products, causal attention, the head for the last row."""
        return self.shape.prefill_flops(num_tokens)
