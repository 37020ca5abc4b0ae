"""Small models whose sizes are round nowhere, so that every kernel has a tail: hidden, heads, vocabulary."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from bench.make_checkpoint import CheckpointFormat, make_checkpoint
from bench.shapes import ModelShape
from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from staffetta.identity import SINGLE_NAME

ODD: Final = ModelShape(
    vocab_size=517,
    hidden_size=90,
    intermediate_size=150,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=30,
    max_positions=2048,
)
TWINS: Final = replace(ODD, vocab_size=4133, hidden_size=250)
"""So many outputs that few of them may be the largest, in rows so long that int8 loses more than between twins."""
_BIAS_DEVIATION: Final = 0.1


def make_odd_model(directory: Path, *, seed: int) -> Path:
    """A Llama model of the shape `ODD`; three query heads share one of keys and values."""
    make_checkpoint(directory, ODD, seed=seed, stored=CheckpointFormat.BF16)
    return directory


def make_biased_model(directory: Path, *, seed: int) -> Path:
    """The same with a random bias in every linear layer."""
    make_odd_model(directory, seed=seed)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True, "mlp_bias": True}))
    weights = load_file(directory / SINGLE_NAME)
    generator = torch.Generator().manual_seed(seed)
    for name, size in tensor_shapes(ModelConfig.from_directory(directory)).items():
        if name not in weights:
            weights[name] = (torch.randn(size, generator=generator) * _BIAS_DEVIATION).bfloat16()
    save_file(weights, directory / SINGLE_NAME, metadata={"format": "pt"})
    return directory


def make_twins_model(directory: Path, *, seed: int) -> Path:
    """A Llama model of the shape `TWINS` in which every token has a twin, in half the vocabulary's distance.

    Their rows of the head differ in the last bit of about every second number. Which of two twins is likelier shows in
    exact logits alone: every greedy token depends on that.
    """
    make_checkpoint(directory, TWINS, seed=seed, stored=CheckpointFormat.BF16)
    weights = load_file(directory / SINGLE_NAME)
    half = TWINS.vocab_size // 2
    rows = weights["model.embed_tokens.weight"].view(torch.int16)
    nudges = torch.randint(0, 2, (half, TWINS.hidden_size), generator=torch.Generator().manual_seed(seed))
    rows[half : 2 * half] = rows[:half] ^ nudges.short()
    save_file(weights, directory / SINGLE_NAME, metadata={"format": "pt"})
    return directory
