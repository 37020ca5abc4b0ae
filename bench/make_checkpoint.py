"""Writes a Hugging Face directory with random weights: `python -m bench.make_checkpoint DIR --shape 0.5b --seed 1`.

The directory is whole: configuration, weights, a working tokenizer with chat template. Equal arguments give equal
bytes. `--format w8a8` writes the same weights as compressed-tensors INT8 (a scale per output channel, activations
quantized token by token as they come), so that every server compared reads the same integers. Never more than one
piece of a tensor is in memory.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from math import sqrt
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bench.safetensors_stream import PlannedTensor, write_safetensors
from bench.shapes import BOS_TOKEN_ID, EOS_TOKEN_ID, RMS_NORM_EPS, ROPE_THETA, SHAPES, SIZE_NAMES, ModelShape
from bench.tokenizer import FIRST_WORD_ID, make_tokenizer, write_tokenizer
from engine.models.llama import tensor_shapes
from staffetta.identity import SINGLE_NAME

_PIECE_ELEMENTS: Final = 2**24
_EMBEDDING: Final = "model.embed_tokens.weight"
_LOGIT_DEVIATION: Final = 0.5
"""Standard deviation of the logits: far from flat, far from overflow."""
_QUIET: Final = 0.01
"""Factor of the embeddings of special tokens and single bytes: greedy output is words, each a piece of text at once."""
_ADDED_GAIN: Final = 2.0
"""Makes up for what the gate and averaging over keys take away."""


class CheckpointFormat(Enum):
    """How the linear layers' weights are stored."""

    BF16 = "bf16"
    W8A8 = "w8a8"
    """compressed-tensors: int8 weights with a bfloat16 scale per output; embedding, head and norms stay bfloat16."""


def make_checkpoint(directory: Path, shape: ModelShape, *, seed: int, stored: CheckpointFormat) -> None:
    """Writes the directory, which may exist and is then overwritten file by file; config.json comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    config_path = directory / "config.json"
    config_path.unlink(missing_ok=True)  # nobody takes a half-written directory for a model
    write_tokenizer(make_tokenizer(shape.vocab_size), directory, max_positions=shape.max_positions)
    write_safetensors(directory / SINGLE_NAME, list(_plan(shape, seed=seed, stored=stored)))
    generation = {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": 0, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    config_path.write_text(json.dumps(config_fields(shape, stored=stored), indent=2) + "\n")


def config_fields(shape: ModelShape, *, stored: CheckpointFormat) -> dict[str, Any]:
    """The fields of config.json."""
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": shape.max_positions,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "torch_dtype": "bfloat16",
    }
    if stored is CheckpointFormat.W8A8:
        fields["quantization_config"] = _quantization()
    return fields


def _quantization() -> dict[str, Any]:
    """INT8 in the words of compressed-tensors."""
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _plan(shape: ModelShape, *, seed: int, stored: CheckpointFormat) -> Iterator[PlannedTensor]:
    """Every tensor in the order of the file; a scale comes right after its weight."""
    for name, size in tensor_shapes(shape.model_config()).items():
        num_quiet = FIRST_WORD_ID if name == _EMBEDDING else 0
        tensor = _RandomTensor(name, size, deviation=_deviation(name, size, shape), seed=seed, num_quiet=num_quiet)
        if stored is CheckpointFormat.W8A8 and name.endswith("_proj.weight"):
            quantized = _QuantizedTensor(tensor)
            yield PlannedTensor(name, torch.int8, size, quantized.pieces)
            yield PlannedTensor(f"{name}_scale", torch.bfloat16, (size[0], 1), quantized.scales)
        else:
            yield PlannedTensor(name, torch.bfloat16, size, tensor.pieces)


def _deviation(name: str, size: tuple[int, ...], shape: ModelShape) -> float:
    """Standard deviation of a tensor's elements, such that every layer's output has one of about 1.

    What is added to the residual stream is smaller, so that its sum over all layers has about 1 too. The embedding is
    small beside that sum: a tied head must not vote for the token that was just read, again and again.
    """
    if len(size) == 1:
        return 0.0
    if "layers" not in name:
        return _LOGIT_DEVIATION / sqrt(shape.hidden_size)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return _ADDED_GAIN / sqrt(2 * shape.num_layers * size[1])
    return 1.0 / sqrt(size[1])


class _RandomTensor:
    """Normal elements around 0, or, without deviation, ones. Equal seed and name give equal elements."""

    def __init__(self, name: str, size: tuple[int, ...], *, deviation: float, seed: int, num_quiet: int) -> None:
        """The first `num_quiet` rows are small."""
        self._num_quiet = num_quiet
        self._size = size
        self._deviation = deviation
        self._seed = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")

    def pieces(self) -> Iterator[Tensor]:
        """The elements, bfloat16, a number of rows at a time."""
        if not self._deviation:
            yield torch.ones(self._size, dtype=torch.bfloat16)
            return
        generator = torch.Generator().manual_seed(self._seed)
        rows, columns = self._size
        step = max(1, _PIECE_ELEMENTS // columns)
        for start in range(0, rows, step):
            piece = torch.randn(min(step, rows - start), columns, generator=generator) * self._deviation
            piece[: max(0, self._num_quiet - start)] *= _QUIET
            yield piece.bfloat16()


class _QuantizedTensor:
    """A random tensor as int8, symmetric, with a scale per row; the scales are known once the pieces are made."""

    def __init__(self, tensor: _RandomTensor) -> None:
        self._tensor = tensor
        self._scales: list[Tensor] = []

    def pieces(self) -> Iterator[Tensor]:
        """The rows as integers from -127 to 127."""
        for piece in self._tensor.pieces():
            values = piece.float()
            # Rounded to what the file stores before it divides, so that integers and stored scale belong together.
            scales = (values.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
            self._scales.append(scales)
            yield torch.round(values / scales.float()).clamp_(-127, 127).to(torch.int8)

    def scales(self) -> Iterator[Tensor]:
        """The scale of every row, bfloat16, [rows, 1]; after `pieces`."""
        yield from self._scales
        self._scales.clear()


def main(argv: Sequence[str]) -> int:
    """Writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", choices=[each.value for each in CheckpointFormat], default="bf16")
    for name in SIZE_NAMES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="overrules the shape's own")
    options = parser.parse_args(argv)
    overruled = {name: value for name in SIZE_NAMES if (value := getattr(options, name)) is not None}
    shape = dataclasses.replace(SHAPES[options.shape], **overruled)
    make_checkpoint(options.directory, shape, seed=options.seed, stored=CheckpointFormat(options.format))
    size = sum(path.stat().st_size for path in options.directory.iterdir())
    print(f"{options.directory}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
