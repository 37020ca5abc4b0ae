"""The measurement of block sizes: what it computes over, and how its rows are made."""

from pathlib import Path

import pytest

from demo import MODEL_DIR
from tests.bars.block_size import Contender, Decodes, Pages, cost_row, make_contenders, measure, step_rows

SIZES = (16, 32)


@pytest.fixture(scope="module")
def contenders() -> list[Contender]:
    return make_contenders(Path(MODEL_DIR), threads=1, num_positions=512, block_sizes=SIZES)


def test_every_block_size_runs_over_a_pool_of_each_kind_of_pages(contenders: list[Contender]) -> None:
    kinds = [(each.pages, each.block_size, each.num_blocks) for each in contenders]
    assert kinds == [(pages, size, 512 // size) for pages in Pages for size in SIZES]
    assert contenders[1].page_bytes == 2 * contenders[0].page_bytes


def test_streams_compute_their_last_position_over_blocks_of_their_own(contenders: list[Contender]) -> None:
    for contender in contenders:
        slices = contender.slices(Decodes(3, 100), seed=1)
        assert [(part.start, len(part.token_ids)) for part in slices] == [(99, 1)] * 3
        blocks = [block for part in slices for block in part.block_ids]
        assert len(set(blocks)) == len(blocks) == 3 * -(-100 // contender.block_size)
        assert blocks != sorted(blocks)


def test_every_contender_has_as_many_turns(contenders: list[Contender]) -> None:
    turns = measure(contenders, Decodes(2, 40), seconds=0.0)
    assert [len(own) for own in turns] == [3] * len(contenders)
    assert min(min(own) for own in turns) > 0


def test_a_row_compares_turns_of_one_round(contenders: list[Contender]) -> None:
    rows = step_rows(contenders[:2], Decodes(2, 2048), [[4.0, 9.0, 6.0], [2.0, 3.0, 6.0]])
    assert rows == [
        ["2 x 2,048", "huge", 16, "6.00 (4.00 to 9.00)", "1.000 (1.000 to 1.000)"],
        ["2 x 2,048", "huge", 32, "3.00 (2.00 to 6.00)", "2.000 (1.000 to 3.000)"],
    ]


def test_a_larger_block_costs_half_of_itself_at_the_mean(contenders: list[Contender]) -> None:
    per_token = contenders[0].page_bytes / 16 / 2**20
    assert cost_row(contenders[0]) == [16, 7.5, pytest.approx(7.5 * per_token)]
    assert cost_row(contenders[1]) == [32, 15.5, pytest.approx(15.5 * per_token)]
