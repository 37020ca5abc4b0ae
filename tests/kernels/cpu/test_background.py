"""Steps of a driver: the bits of steps in calls, in order, held, discarded; threads that sleep, end and are forked."""

import subprocess
import sys
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, Batch, Definition, Operations, WeightFormat
from kernels.background import BackgroundStep, Following, StepInFlight
from kernels.cpu.backend import CpuBackend
from kernels.reference import ReferenceBackend
from kernels.sampling import TokenDraw
from tests.kernels.cpu.test_step import BLOCK_SIZE, VOCABULARY, everything, make_pages

FIRST = [3, 5, 7]
CONTEXTS = 3, 7, 5
NUM_STEPS = 8


class Model(NamedTuple):
    """A definition whose first result is logits, on a backend."""

    backend: CpuBackend
    definition: Definition

    def background(self) -> BackgroundStep:
        background = self.backend.background_step(self.definition)
        assert background is not None
        return background


def make_model(*, threads: int = 2, stored: WeightFormat = WeightFormat.AS_GIVEN) -> Model:
    backend = CpuBackend(threads=threads)
    return Model(backend, everything(backend, torch.float32, stored=stored))


def make_batch(token_ids: Sequence[int], step: int, *, sequences: Sequence[int] = range(len(CONTEXTS))) -> Batch:
    """One token for each of `sequences`, `step` after its context."""
    count, positions = len(sequences), [CONTEXTS[index] + step for index in sequences]
    tables = [[4 * index + block for block in range(4)] for index in sequences]
    slots = [tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, p in enumerate(positions)]
    parts = [token_ids, positions, slots, range(count + 1), [p + 1 for p in positions], *tables, range(count)]
    return Batch(
        array("q", [number for part in parts for number in part]),
        num_tokens=count,
        num_sequences=count,
        max_blocks=4,
        num_drawn=count,
        num_scored=0,
    )


def make_draws(step: int, *, count: int = len(CONTEXTS)) -> list[TokenDraw]:
    """One of each row: greedy of the first, at random of the others."""
    return [TokenDraw(row, 0.9 if row else 0.0, 0, 0.95, 7 + row, output_index=step) for row in range(count)]


def in_calls(model: Model) -> tuple[list[list[int]], Tensor]:
    """Tokens of each step, and the pages, when every step is a call."""
    pages, compute = make_pages(), model.backend.compile_step(model.definition)
    tokens = [FIRST]
    for step in range(NUM_STEPS):
        logits, _ = compute(make_batch(tokens[-1], step), pages)
        tokens.append(model.backend.sample(logits, make_draws(step)))
    return tokens[1:], pages


def in_background(model: Model) -> tuple[list[list[int] | None], Tensor]:
    """The same, each step begun before the one before it is finished."""
    pages, background = make_pages(), model.background()
    tokens: list[list[int] | None] = []
    step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
    for number in range(1, NUM_STEPS):
        follows = Following(step, tuple(range(len(CONTEXTS))))
        after = background.begin(make_batch([-1] * 3, number), pages, make_draws(number), follows=follows)
        tokens.append(step.finish())
        step = after
    tokens.append(step.finish())
    return tokens, pages


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("stored", WeightFormat, ids=lambda stored: stored.name.lower())
def test_steps_that_follow_one_another_have_the_bits_of_steps_in_calls(stored: WeightFormat, threads: int) -> None:
    model = make_model(threads=threads, stored=stored)
    expected, pages = in_calls(model)
    for _ in range(5):
        tokens, written = in_background(model)
        assert tokens == expected
        assert torch.equal(written, pages)


def test_threads_have_drivers_of_their_own() -> None:
    model = make_model()
    expected, _ = in_calls(model)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: in_background(model)[0], range(30)))
    assert results == [expected] * 30


def test_a_step_may_follow_some_of_the_rows_in_another_order() -> None:
    model = make_model()
    (first, *_), _ = in_calls(model)
    pages, background = make_pages(), model.background()
    step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
    batch = make_batch([-1, -1], 1, sequences=(2, 0))
    after = background.begin(batch, pages, make_draws(1, count=2), follows=Following(step, (2, 0)))
    assert step.finish() == first
    drawn = after.finish()
    assert batch.token_ids.tolist() == [first[2], first[0]]
    compute, in_calls_pages = model.backend.compile_step(model.definition), make_pages()
    compute(make_batch(FIRST, 0), in_calls_pages)
    logits, _ = compute(make_batch([first[2], first[0]], 1, sequences=(2, 0)), in_calls_pages)
    assert drawn == model.backend.sample(logits, make_draws(1, count=2))
    assert torch.equal(pages, in_calls_pages)


def test_a_held_step_is_refused_and_nothing_is_written() -> None:
    model = make_model()
    pages, background = make_pages(), model.background()
    background.hold()
    step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
    after = follow(background, step, pages)
    assert step.finish() is not None
    written = pages.clone()
    assert after.finish() is None and after.is_refused and not step.is_refused
    assert torch.equal(pages, written)
    background.go_on()
    step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
    assert step.finish() is not None and follow(background, step, pages).finish() is not None


def test_a_hold_holds_although_it_is_over_before_the_driver_looks() -> None:
    model = make_model()
    (first, *_), _ = in_calls(model)
    background, held = model.background(), 0
    for _ in range(50):
        pages = make_pages()
        step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
        after = follow(background, step, pages)
        background.hold()
        background.go_on()
        is_refused = after.is_refused
        assert step.finish() == first
        assert is_refused or after.finish() is not None, "it was under way"
        after.discard()
        held += is_refused
    assert held > 0, "the driver was early every time"


def test_a_step_may_be_finished_and_discarded_by_another_thread() -> None:
    model = make_model()
    (first, *_), _ = in_calls(model)
    background, pages = model.background(), make_pages()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
            assert pool.submit(step.finish).result() == first
            step = background.begin(make_batch(FIRST, 0), pages, make_draws(0))
            pool.submit(step.discard).result()
            assert step.finish() in (first, None)


def follow(background: BackgroundStep, step: StepInFlight, pages: Tensor) -> StepInFlight:
    return background.begin(make_batch([-1] * 3, 1), pages, make_draws(1), follows=Following(step, (0, 1, 2)))


def test_a_step_that_computing_refuses_brings_nothing_and_is_not_followed() -> None:
    background, pages = make_model().background(), make_pages()
    step = background.begin(make_batch([3, VOCABULARY, 5], 0), pages, make_draws(0))
    after = follow(background, step, pages)
    assert step.finish() is None and not step.is_refused
    assert after.finish() is None and after.is_refused


def test_a_step_with_a_token_that_cannot_be_drawn_brings_the_others_and_is_followed_by_those_alone() -> None:
    model = make_model()
    (first, *_), _ = in_calls(model)
    background, pages = model.background(), make_pages()
    draws = make_draws(0)
    draws[1] = draws[1]._replace(banned=tuple(range(VOCABULARY)))
    step = background.begin(make_batch(FIRST, 0), pages, draws)
    after = follow(background, step, pages)
    drawn = step.finish()
    assert drawn is not None and drawn[1] < 0 and [drawn[0], drawn[2]] == [first[0], first[2]]
    assert after.finish() is None and after.is_refused
    step = background.begin(make_batch(FIRST, 0), pages, draws)
    batch = make_batch([-1, -1], 1, sequences=(0, 2))
    after = background.begin(batch, pages, make_draws(1, count=2), follows=Following(step, (0, 2)))
    assert step.finish() == drawn and after.finish() is not None and not after.is_refused


def test_a_draw_of_a_row_that_is_not_there_brings_nothing() -> None:
    background = make_model().background()
    step = background.begin(make_batch(FIRST, 0), make_pages(), [TokenDraw(3, 0.0)])
    assert step.finish() is None


def test_a_discarded_step_leaves_the_driver_to_the_next_one() -> None:
    model = make_model()
    expected, _ = in_calls(model)
    background = model.background()
    for _ in range(20):
        step = background.begin(make_batch(FIRST, 0), make_pages(), make_draws(0))
        follow(background, step, make_pages()).discard()
        step.discard()
        assert background.begin(make_batch(FIRST, 0), make_pages(), make_draws(0)).finish() == expected[0]


def test_one_thread_and_the_reference_compute_nothing_in_the_background() -> None:
    model = make_model(threads=1)
    backends: list[Backend] = [model.backend, ReferenceBackend()]
    assert [backend.background_step(model.definition) for backend in backends] == [None, None]


def test_a_definition_whose_first_result_is_no_logits_is_refused() -> None:
    backend = CpuBackend(threads=2)
    body = everything(backend, torch.float32, stored=WeightFormat.AS_GIVEN)

    def scored_first(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        logits, scored = body(ops, batch, pages)
        return scored, logits

    with pytest.raises(ValueError, match="tokens are drawn from the definition's first result"):
        backend.background_step(scored_first)


def test_a_step_of_something_else_cannot_be_followed() -> None:
    class Other:
        is_refused = False

        def finish(self) -> None: ...

        def discard(self) -> None: ...

    with pytest.raises(TypeError, match="is no step of the compiled kernels"):
        follow(make_model().background(), Other(), make_pages())


def _run(script: str) -> "subprocess.CompletedProcess[str]":
    header = "import os, threading\nfrom tests.kernels.cpu.test_background import *\n"
    threads = "from tests.kernels.cpu.test_team import members, num_threads, until\n"
    return subprocess.run([sys.executable, "-c", header + threads + script], capture_output=True, text=True)


def test_a_driver_and_its_team_sleep_when_nothing_is_to_be_done_and_are_no_more_than_asked_for() -> None:
    run = _run(
        "made = []\n"
        "maker = threading.Thread(target=lambda: made.append(make_model(threads=3)))\n"
        "maker.start(); maker.join()\n"  # and with it the team that packed the weights
        "until(lambda: not members(), os.sched_yield)\n"
        "background = made[0].background()\n"
        "background.begin(make_batch(FIRST, 0), make_pages(), make_draws(0)).finish()\n"
        "print(len(members()))\n"  # the driver and a member; the caller is the third
        "until(lambda: {member.state for member in members()} == {'S'}, os.sched_yield)\n"
        "print('ok')\n"
    )
    assert run.stdout.split() == ["2", "ok"], run.stderr


def test_a_driver_ends_with_the_thread_that_began_its_steps() -> None:
    run = _run(
        "model, tokens = make_model(threads=3), []\n"
        "before = num_threads()\n"
        "for _ in range(5):\n"
        "    thread = threading.Thread(target=lambda: tokens.append(in_background(model)[0]))\n"
        "    thread.start(); thread.join()\n"
        "until(lambda: num_threads() == before, os.sched_yield)\n"
        "print(len(tokens))\n"
    )
    assert run.stdout.split() == ["5"], run.stderr


def test_a_forked_child_has_a_driver_of_its_own() -> None:
    run = _run(
        "model = make_model()\n"
        "before, _ = in_background(model)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if in_background(model)[0] == before else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), in_background(model)[0] == before)\n"
    )
    assert run.stdout.split() == ["0", "True"], run.stderr


def test_a_driver_that_cannot_be_started_refuses_and_the_next_step_works() -> None:
    run = _run(
        "import resource; from pathlib import Path\n"
        "model, pages = make_model(), make_pages()\n"
        "expected, _ = in_calls(make_model(threads=1))\n"
        "background = model.background()\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "limits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, limits[1]))\n"
        "try: background.begin(make_batch(FIRST, 0), pages, make_draws(0))\n"
        "except RuntimeError as error: print(type(error).__name__)\n"
        "resource.setrlimit(resource.RLIMIT_AS, limits)\n"
        "print(background.begin(make_batch(FIRST, 0), pages, make_draws(0)).finish() == expected[0])\n"
    )
    assert run.stdout.split() == ["CannotBeginError", "True"], run.stderr
