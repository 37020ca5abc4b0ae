"""A step in one call has the bits of its definition, run operation by operation: results, keys and values."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import lay_out
from engine.model_config import ModelConfig
from engine.models.llama import Llama
from engine.step import Score, SequenceSlice
from kernels.backend import Batch, WeightFormat
from kernels.cpu.backend import CpuBackend
from kernels.reference import ReferenceBackend
from tests.engine.model_directory import (
    BLOCK_SIZE,
    make_config_directory,
    make_sampling,
    make_slice,
    make_weights,
)

NUM_BLOCKS = 96
NUM_STEPS = 12
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3},
}
STORED = {
    "float32": (torch.float32, WeightFormat.AS_GIVEN),
    "bfloat16": (torch.bfloat16, WeightFormat.AS_GIVEN),
    "float16": (torch.float16, WeightFormat.AS_GIVEN),
    "float32-int8": (torch.float32, WeightFormat.INT8),
    "bfloat16-int8": (torch.bfloat16, WeightFormat.INT8),
    "float32-int8-weight": (torch.float32, WeightFormat.INT8_WEIGHT),
    "bfloat16-int4": (torch.bfloat16, WeightFormat.INT4),
}


def make_model(
    path: Path, backend: CpuBackend | ReferenceBackend, *, stored: str = "float32", **overrides: Any
) -> tuple[Llama, Tensor]:
    """A random model, and pages for it: zeros, as a new pool has."""
    directory = make_config_directory(path, **overrides)
    config, (dtype, layers_stored) = ModelConfig.from_directory(directory), STORED[stored]
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(directory).items()}
    shape = NUM_BLOCKS, config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim
    return Llama.from_weights(config, weights, backend, layers_stored=layers_stored), torch.zeros(shape, dtype=dtype)


def make_steps(random: Random) -> Iterator[Batch]:
    """Steps of some sequences: first chunks, later ones, decodes, in any mixture; some are scored, some not drawn."""
    blocks = list(range(NUM_BLOCKS))
    random.shuffle(blocks)
    sequences = [([random.randrange(97) for _ in range(60)], blocks[16 * i : 16 * i + 16]) for i in range(6)]
    starts = [0] * len(sequences)
    for _ in range(NUM_STEPS):
        parts: list[SequenceSlice] = []
        for index in random.sample(range(len(sequences)), random.randint(1, len(sequences))):
            token_ids, block_ids = sequences[index]
            end = min(starts[index] + random.choice([1, 1, 1, 5, 17]), len(token_ids))
            if end == starts[index]:
                continue
            sampling = make_sampling() if random.random() < 0.7 else None
            part = make_slice(token_ids[:end], start=starts[index], blocks=block_ids, sampling=sampling)
            if random.random() < 0.3:
                targets = tuple(token_ids[starts[index] : end])
                part = SequenceSlice(
                    part.request_id, part.token_ids, part.start, part.block_ids, part.draw, Score(targets, 0)
                )
            parts.append(part)
            starts[index] = end
        if parts:  # the engine computes no empty step
            yield lay_out(tuple(parts), block_size=BLOCK_SIZE)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", MODELS)
def test_one_call_has_the_bits_of_the_operations_one_by_one(name: str, stored: str, tmp_path: Path) -> None:
    backend = CpuBackend(threads=2)
    model, pages = make_model(tmp_path / "model", backend, stored=stored, **MODELS[name])
    other_pages, compute = pages.clone(), backend.compile_step(model.forward)
    num_drawn = num_scored = 0
    for batch in make_steps(Random(name + stored)):
        expected = model.forward(backend, batch, pages)
        results = compute(batch, other_pages)
        for result, tensor in zip(results, expected, strict=True):
            assert (result.shape, result.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(result, tensor)
        assert torch.equal(pages, other_pages)
        num_drawn, num_scored = num_drawn + batch.num_drawn, num_scored + batch.num_scored
    assert num_drawn > 20 and num_scored > 20, "steps that ask for nothing prove nothing"


def test_the_reference_computes_its_definition(tmp_path: Path) -> None:
    backend = ReferenceBackend()
    model, pages = make_model(tmp_path / "model", backend)
    other_pages, compute = pages.clone(), backend.compile_step(model.forward)
    for batch in make_steps(Random(5)):
        expected = model.forward(backend, batch, pages)
        assert all(torch.equal(*pair) for pair in zip(compute(batch, other_pages), expected, strict=True))
    assert torch.equal(pages, other_pages)
    assert pages.count_nonzero() > 0


def test_a_step_has_results_of_its_own(tmp_path: Path) -> None:
    backend = CpuBackend(threads=1)
    model, pages = make_model(tmp_path / "model", backend)
    compute = backend.compile_step(model.forward)
    first, second = list(make_steps(Random(1)))[:2]
    kept = compute(first, pages)
    before = [tensor.clone() for tensor in kept]
    compute(second, pages)
    assert all(torch.equal(*pair) for pair in zip(kept, before, strict=True))


def make_batch(**changes: Any) -> Batch:
    """Two tokens of one sequence; `changes` replace parts."""
    parts: dict[str, list[int]] = {
        "token_ids": [5, 6],
        "positions": [0, 1],
        "slots": [8, 9],
        "query_starts": [0, 2],
        "context_lens": [2],
        "block_tables": [2],
        "drawn_rows": [1],
        "scored_rows": [],
    }
    numbers = array("q", [number for part in (parts | changes).values() for number in part])
    return Batch(numbers, num_tokens=2, num_sequences=1, max_blocks=1, num_drawn=1, num_scored=0)


REFUSED = {
    "token_ids": ([5, 97], "a token id is outside the vocabulary of 97"),
    "positions": ([0, 256], "a slot is outside 96 pages, or a position outside 256"),
    "slots": ([8, NUM_BLOCKS * BLOCK_SIZE], "a slot is outside 96 pages"),
    "context_lens": ([1], "a context is shorter than its queries"),
    "block_tables": ([NUM_BLOCKS], "reaches outside its table or 96 pages"),
    "drawn_rows": ([2], "an index is outside 2 rows"),
}


@pytest.mark.parametrize("part", REFUSED)
def test_what_an_operation_refuses_the_one_call_refuses_in_its_words(part: str, tmp_path: Path) -> None:
    backend = CpuBackend(threads=1)
    model, pages = make_model(tmp_path / "model", backend)
    compute = backend.compile_step(model.forward)
    numbers, message = REFUSED[part]
    for way in (compute, lambda batch, pages: model.forward(backend, batch, pages)):
        with pytest.raises(IndexError, match=message):
            way(make_batch(**{part: numbers}), pages)
    logits, _ = compute(make_batch(), pages)
    assert torch.equal(logits, model.forward(backend, make_batch(), pages)[0])
