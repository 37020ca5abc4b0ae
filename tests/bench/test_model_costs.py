"""What a model costs, read from a directory's configuration and headers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.make_checkpoint import CheckpointFormat, make_checkpoint
from bench.model_costs import Arithmetic, ModelCosts
from bench.shapes import SHAPES
from staffetta.exits import ModelNotFoundError

TINY = SHAPES["tiny"]
NORMS = (2 * TINY.num_layers + 1) * TINY.hidden_size * 2
SCALES = TINY.num_layers * (4 * 32 + 2 * 2 * 32 + 128 + 2 * 384 + 128) * 2


@pytest.mark.parametrize(
    ("stored", "arithmetic", "others"),
    [
        (CheckpointFormat.BF16, Arithmetic.BF16, NORMS),
        (CheckpointFormat.W8A8, Arithmetic.INT8, NORMS + SCALES),
    ],
)
def test_a_directory_costs_what_its_tensors_hold(
    tmp_path: Path, stored: CheckpointFormat, arithmetic: Arithmetic, others: int
) -> None:
    make_checkpoint(tmp_path, TINY, seed=1, stored=stored)
    found = ModelCosts.from_directory(tmp_path)
    planned = ModelCosts.from_shape(TINY, arithmetic)
    assert (found.shape, found.arithmetic) == (TINY, arithmetic)
    assert found.decode_bytes == planned.decode_bytes + others
    assert found.prefill_flops(512) == planned.prefill_flops(512) == TINY.prefill_flops(512)


def test_an_embedding_that_is_no_head_is_not_read_by_a_step(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TINY, seed=1, stored=CheckpointFormat.BF16)
    tied = ModelCosts.from_directory(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    untied = ModelCosts.from_directory(tmp_path)
    assert tied.decode_bytes - untied.decode_bytes == TINY.vocab_size * TINY.hidden_size * 2


def test_the_prompts_operations_grow_with_weights_and_with_the_square_of_its_length() -> None:
    costs = ModelCosts.from_shape(replace(TINY, num_layers=1), Arithmetic.BF16)
    layer = 128 * (128 + 128) + 128 * 128 + 128 * 768 + 384 * 128
    assert costs.prefill_flops(3) == 2 * 3 * layer + 4 * 128 * 6 + 2 * 1024 * 128


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        ModelCosts.from_directory(tmp_path)
