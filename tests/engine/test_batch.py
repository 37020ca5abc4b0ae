"""How slices become tensors, to the last number."""

import pytest

from engine.batch import lay_out
from engine.step import Score
from tests.engine.model_directory import make_sampling, make_slice


def test_slices_are_laid_out_one_after_another() -> None:
    batch = lay_out(
        (
            make_slice([1, 2, 3, 4, 5, 6], start=5, blocks=[7, 3], sampling=make_sampling()),
            make_slice([9, 8, 7], start=0, blocks=[2], sampling=None),
            make_slice([5, 5, 5, 6, 7, 8, 9], start=3, blocks=[10, 0, 6, 4], sampling=make_sampling()),
        ),
        block_size=4,
    )
    assert batch.token_ids.tolist() == [6, 9, 8, 7, 6, 7, 8, 9]
    assert batch.positions.tolist() == [5, 0, 1, 2, 3, 4, 5, 6]
    assert batch.slots.tolist() == [13, 8, 9, 10, 43, 0, 1, 2]
    assert batch.spans.query_starts.tolist() == [0, 1, 4, 8]
    assert batch.spans.context_lens.tolist() == [6, 3, 7]
    assert batch.spans.block_tables.tolist() == [[7, 3], [2, 0], [10, 0]]
    assert (batch.drawn_rows.tolist(), batch.scored_rows.tolist()) == ([0, 7], [])


def test_blocks_that_were_taken_ahead_are_not_read() -> None:
    batch = lay_out((make_slice([1], start=0, blocks=[5, 6, 7], sampling=None),), block_size=4)
    assert batch.spans.block_tables.tolist() == [[5]]
    assert (batch.drawn_rows.tolist(), batch.scored_rows.tolist()) == ([], [])


def test_rows_that_are_drawn_from_and_rows_that_are_scored_are_told_apart() -> None:
    first = make_slice([1, 2, 3], start=0, blocks=[0], sampling=make_sampling())
    second = make_slice([4, 5, 6, 7], start=1, blocks=[1], sampling=None)
    third = make_slice([8, 9], start=0, blocks=[2], sampling=make_sampling())
    batch = lay_out(
        (
            first._replace(score=Score(targets=(2, 3), num_alternatives=0)),
            second._replace(score=Score(targets=(6, 7, 8), num_alternatives=0)),
            third,
        ),
        block_size=4,
    )
    assert batch.drawn_rows.tolist() == [2, 7]
    assert batch.scored_rows.tolist() == [0, 1, 3, 4, 5]


def test_a_row_may_be_drawn_and_scored_and_none_has_two_targets() -> None:
    part = make_slice([1, 2], start=0, blocks=[0], sampling=make_sampling())
    batch = lay_out((part._replace(score=Score(targets=(2, 3), num_alternatives=0)),), block_size=4)
    assert (batch.drawn_rows.tolist(), batch.scored_rows.tolist()) == ([1], [0, 1])
    with pytest.raises(ValueError, match="slice of request-0 has 3 targets for 2 tokens"):
        lay_out((part._replace(score=Score(targets=(2, 3, 4), num_alternatives=0)),), block_size=4)


@pytest.mark.parametrize(
    ("token_ids", "start", "blocks"), [([1], 1, [0]), ([1] * 5, 0, [0]), ([1] * 9, 8, [0, 1])], ids=str
)
def test_a_slice_without_tokens_or_without_room_is_refused(token_ids: list[int], start: int, blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=f"slice of request-0 has .* {len(blocks)} blocks of 4"):
        lay_out((make_slice(token_ids, start=start, blocks=blocks, sampling=None),), block_size=4)
