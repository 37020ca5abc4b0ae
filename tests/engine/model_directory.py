"""Tiny Llama directories with random weights, as Hugging Face tools write them, and runners over them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from engine.request import RequestId, SamplingParams
from engine.runner import ModelRunner, load_runner
from engine.step import Draw, SequenceSlice
from kvtransfer.layout import BlockId
from staffetta.identity import model_digest

BLOCK_SIZE = 4
NUM_BLOCKS = 128

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_config_directory(path: Path, **overrides: Any) -> Path:
    """Writes config.json alone; an override of None removes the field."""
    fields = {name: value for name, value in (TINY | overrides).items() if value is not None}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


def make_weights(path: Path, *, seed: int = 11) -> dict[str, Tensor]:
    """Random tensors as the directory's config declares them, large enough that logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(ModelConfig.from_directory(path))
    return {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else 0.2) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def make_model_directory(path: Path, **overrides: Any) -> Path:
    """Writes config.json and model.safetensors, float32."""
    make_config_directory(path, **overrides)
    save_file(make_weights(path), path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_runner(path: Path, *, block_size: int = BLOCK_SIZE, pool: bytearray | None = None) -> ModelRunner:
    """A runner over `pool`, or over zeroed memory of its own, on one thread."""
    config = ModelConfig.from_directory(path)
    layout = config.kv_layout(block_size=block_size, dtype="float32", model_digest=model_digest(path))
    memory = bytearray(layout.page_bytes * NUM_BLOCKS) if pool is None else pool
    return load_runner(path, config, layout, pool=memoryview(memory), num_blocks=NUM_BLOCKS, threads=1, device="cpu")


def make_sampling(**overrides: Any) -> SamplingParams:
    """Greedy, log-probability of the chosen token, nothing else."""
    fields: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "max_tokens": 64,
        "min_tokens": 0,
        "stop_token_ids": frozenset(),
        "num_logprobs": 0,
    }
    return SamplingParams(**(fields | overrides))


def make_slice(
    token_ids: list[int], *, start: int, blocks: list[int], sampling: SamplingParams | None, output_index: int = 0
) -> SequenceSlice:
    """The slice of `token_ids[start:]`; `blocks` are the sequence's block ids."""
    return SequenceSlice(
        request_id=RequestId(f"request-{blocks[0]}"),
        token_ids=tuple(token_ids[start:]),
        start=start,
        block_ids=tuple(BlockId(block) for block in blocks),
        draw=None if sampling is None else Draw(sampling, output_index),
    )
