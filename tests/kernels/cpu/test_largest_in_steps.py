"""Which steps compute the largest logits alone: a driver's that draw nothing else; and their tokens, as ever."""

from array import array
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.backend import Batch, Definition, Operations
from kernels.background import Following
from kernels.cpu.backend import CpuBackend
from kernels.cpu.linear import CpuLinear
from kernels.sampling import Penalties, TokenDraw
from tests.kernels.cpu.test_largest import MOST_ROWS, near_ties, numbers

NUM_STEPS = 12
TABLE = 1 + numbers(4096, 64, seed=3).abs()
PAGES = torch.empty(0)


def make_head(backend: CpuBackend) -> CpuLinear:
    return backend.prepare_head(near_ties(torch.float32))


def definition(head: CpuLinear, table: Tensor = TABLE) -> Definition:
    """The next token follows from the last one alone."""

    def define(ops: Operations, batch: Batch, _: Tensor) -> tuple[Tensor, ...]:
        hidden = ops.embedding(batch.token_ids, table)
        return (ops.linear(head, ops.take_rows(hidden, batch.drawn_rows), dtype=torch.float32),)

    return define


def make_batch(token_ids: Sequence[int]) -> Batch:
    """One token for each of some sequences, all of which are drawn from."""
    count = len(token_ids)
    parts = token_ids, [0] * count, [0] * count, range(count + 1), [1] * count, [0] * count, range(count)
    return Batch(
        array("q", [number for part in parts for number in part]),
        num_tokens=count,
        num_sequences=count,
        max_blocks=1,
        num_drawn=count,
        num_scored=0,
    )


def in_calls(backend: CpuBackend, head: CpuLinear, first: Sequence[int], draws: Sequence[TokenDraw]) -> list[list[int]]:
    compute, tokens = backend.compile_step(definition(head)), [list(first)]
    for _ in range(NUM_STEPS):
        tokens.append(backend.sample(compute(make_batch(tokens[-1]), PAGES)[0], draws))
    return tokens[1:]


def ahead(
    backend: CpuBackend, head: CpuLinear, first: Sequence[int], draws: Sequence[TokenDraw]
) -> list[list[int] | None]:
    """The same, each step begun before the one before it is finished."""
    background = backend.background_step(definition(head))
    assert background is not None
    step = background.begin(make_batch(first), PAGES, draws)
    tokens = []
    for _ in range(NUM_STEPS - 1):
        follows = Following(step, tuple(range(len(first))))
        after = background.begin(make_batch([-1] * len(first)), PAGES, draws, follows=follows)
        tokens.append(step.finish())
        step = after
    return [*tokens, step.finish()]


def first_tokens(count: int) -> list[int]:
    return [17 + 100 * row for row in range(count)]


def greedy(count: int) -> list[TokenDraw]:
    return [TokenDraw(row, 0.0) for row in range(count)]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("count", range(1, MOST_ROWS + 2))
def test_greedy_tokens_are_those_of_whole_logits(count: int, threads: int) -> None:
    backend = CpuBackend(threads=threads)
    head = make_head(backend)
    first = first_tokens(count)
    assert ahead(backend, head, first, greedy(count)) == in_calls(backend, head, first, greedy(count))


def blind_head(backend: CpuBackend) -> CpuLinear:
    """One whose copy is believed: where it is asked, tokens differ."""
    head = make_head(backend)
    assert head.screen is not None
    head.screen.errors.zero_()
    return head


@pytest.mark.parametrize("count", [1, MOST_ROWS])
def test_the_copy_is_asked_in_steps_that_draw_the_largest_alone(count: int) -> None:
    backend = CpuBackend(threads=2)
    head, first = blind_head(backend), first_tokens(count)
    assert ahead(backend, head, first, greedy(count)) != in_calls(backend, head, first, greedy(count))


OTHERS = {
    "at random": TokenDraw(1, 0.7, seed=3),
    "without some": TokenDraw(1, 0.0, banned=(5, 2005)),
    "with penalties": TokenDraw(1, 0.0, penalties=Penalties(1.2, 0.0, 0.0, (5,), (205,))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_copy_is_not_asked_where_one_is_drawn(other: str) -> None:
    backend = CpuBackend(threads=2)
    head, first, draws = blind_head(backend), first_tokens(2), [TokenDraw(0, 0.0), OTHERS[other]]
    assert ahead(backend, head, first, draws) == in_calls(backend, head, first, draws)


def test_logits_that_are_not_finite_are_no_tokens() -> None:
    backend = CpuBackend(threads=2)
    background = backend.background_step(definition(make_head(backend), torch.full((1, 64), torch.nan)))
    assert background is not None
    assert background.begin(make_batch([0]), PAGES, greedy(1)).finish() == [-1]
