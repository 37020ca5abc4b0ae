"""A batch: its numbers, and the tensors that are views of them."""

from array import array

import pytest
import torch

from kernels.backend import Batch


def make_batch(numbers: "array[int]") -> Batch:
    """Three tokens of two sequences."""
    return Batch(numbers, num_tokens=3, num_sequences=2, max_blocks=2, num_drawn=1, num_scored=2)


NUMBERS = array("q", [5, 6, 7, 0, 1, 4, 8, 9, 12, 0, 2, 3, 2, 5, 2, 0, 1, 3, 2, 0, 1])


def test_tensors_are_the_parts_in_their_order() -> None:
    batch = make_batch(NUMBERS)
    assert batch.token_ids.tolist() == [5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 4]
    assert batch.slots.tolist() == [8, 9, 12]
    assert batch.spans.query_starts.tolist() == [0, 2, 3]
    assert batch.spans.context_lens.tolist() == [2, 5]
    assert batch.spans.block_tables.tolist() == [[2, 0], [1, 3]]
    assert batch.drawn_rows.tolist() == [2]
    assert batch.scored_rows.tolist() == [0, 1]


def test_tensors_are_the_numbers_themselves() -> None:
    numbers = array("q", NUMBERS)
    batch = make_batch(numbers)
    numbers[0] = 77
    assert batch.token_ids.tolist() == [77, 6, 7]
    assert batch.token_ids.data_ptr() == numbers.buffer_info()[0]


def test_a_batch_of_nothing_has_empty_parts() -> None:
    batch = Batch(array("q", [0]), num_tokens=0, num_sequences=0, max_blocks=0, num_drawn=0, num_scored=0)
    assert batch.spans.query_starts.tolist() == [0]
    assert batch.spans.block_tables.shape == (0, 0)
    assert batch.scored_rows.shape == (0,)


@pytest.mark.parametrize("numbers", [NUMBERS[:-1], array("q", [*NUMBERS, 0]), array("d", NUMBERS)], ids=str)
def test_numbers_that_are_not_as_many_as_the_counts_say_are_refused(numbers: "array[int]") -> None:
    with pytest.raises(ValueError, match=f"a batch of 21 int64 has {len(numbers)} {numbers.typecode}"):
        make_batch(numbers)


def test_all_are_of_64_bits() -> None:
    batch = make_batch(NUMBERS)
    assert {tensor.dtype for tensor in (batch.slots, batch.spans.block_tables, batch.drawn_rows)} == {torch.int64}
