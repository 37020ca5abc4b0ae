"""An engine that keeps to its pacer's budgets: what it computes in which step, that it tells how long steps take, and
that no token depends on any of it."""

import math
import random
from collections.abc import Sequence

import pytest

from engine.cache.prefix import PrefixCache
from engine.engine import Engine
from engine.fake import FakeRunner, FakeSource, expected_tokens
from engine.pacing import MeasuredStep
from engine.request import Request, RequestId
from engine.step import SequenceSlice, SliceResult
from kvtransfer.layout import BlockId
from staffetta.hashing import BlockHash
from tests.engine.machines import Machine, linear
from tests.engine.making import BLOCK_SIZE, make_hasher, make_limits, make_prefill, make_request, make_sampling


class ModelledRunner(FakeRunner):
    """Computes what the fake does, and takes as long as `machine` says by a clock of its own."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(block_size=BLOCK_SIZE)
        self.now = 0.0
        self.steps: list[MeasuredStep] = []
        self._machine = machine

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        step = MeasuredStep.of(slices, 0.0)
        self.steps.append(step._replace(seconds=self._machine(step.num_generating, step.num_prompt_tokens)))
        self.now += self.steps[-1].seconds
        return super().run(slices)


def make_modelled(
    *, max_slowdown: float = 2.0, max_batch_tokens: int = 128, max_sequences: int = 8
) -> tuple[Engine, ModelledRunner]:
    runner = ModelledRunner(linear)
    limits = make_limits(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, max_slowdown=max_slowdown)
    engine = Engine(runner, num_blocks=300, hasher=make_hasher(), limits=limits, clock=lambda: runner.now)
    return engine, runner


def make_experienced_engine(*, max_sequences: int = 8) -> tuple[Engine, ModelledRunner]:
    """A step that generates takes 10 ms, prompt tokens alone a little more than 1 ms each."""
    engine, runner = make_modelled(max_slowdown=2.0, max_sequences=max_sequences)
    engine.add(make_request("before", range(5000, 5128)))
    drive(engine, {}, num_steps=5)
    assert not engine.has_work()
    return engine, runner


def drive(engine: Engine, tokens: dict[str, list[int]], *, num_steps: int) -> None:
    """Up to so many steps; adds every token to its request's."""
    for _ in range(num_steps):
        output = engine.step()
        for each in () if output is None else output.outputs:
            tokens.setdefault(each.request_id, []).extend(token.token_id for token in each.tokens)


def wanted(request: Request) -> list[int]:
    return [token.token_id for token in expected_tokens(request)]


def test_a_prompt_alone_is_computed_in_full_chunks() -> None:
    engine, runner = make_modelled()
    engine.add(make_request("a", tuple(range(300))))
    drive(engine, {}, num_steps=3)
    assert [step.num_prompt_tokens for step in runner.steps] == [128, 128, 44]


def test_a_long_prompt_leaves_streams_their_pace_and_is_computed_meanwhile() -> None:
    engine, runner = make_modelled(max_slowdown=2.0)
    engine.add(make_request("stream", sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=10)
    engine.add(make_request("long", tuple(range(400)), sampling=make_sampling(max_tokens=1)))
    tokens: dict[str, list[int]] = {}
    while "long" not in tokens:
        drive(engine, tokens, num_steps=1)
    mixed = [step for step in runner.steps if step.num_generating and step.num_prompt_tokens]
    # 10 ms are allowed beside the stream's own 10 and eight tokens cost 8; the first block was cached.
    assert [step.num_prompt_tokens for step in mixed] == [4, *[8] * 49]
    assert len(tokens["stream"]) == 51  # one step went without prompt tokens


def test_every_prompt_that_waits_adds_to_the_budget_and_the_first_may_use_all_of_it() -> None:
    engine, runner = make_modelled(max_slowdown=2.0, max_batch_tokens=29)
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=10)
    for first in (200, 300, 400):
        engine.add(make_request(str(first), range(first, first + 30), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=6)
    # Three wait, of 30 tokens each; after two steps the first is done, after four the second.
    assert [step.num_prompt_tokens for step in runner.steps[10:]] == [12, 16, 24, 16, 8, 8]


def test_a_prompt_that_has_no_place_in_the_batch_does_not_count() -> None:
    engine, runner = make_modelled(max_slowdown=2.0, max_sequences=2, max_batch_tokens=29)
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=10)
    for first in (200, 300, 400):
        engine.add(make_request(str(first), range(first, first + 30), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=4)
    assert [step.num_prompt_tokens for step in runner.steps[10:]] == [4, 8, 8, 8]


def test_a_burst_is_computed_in_few_steps_because_many_wait_for_few() -> None:
    engine, runner = make_modelled(max_slowdown=2.0)
    engine.add(make_request("first", range(1000, 1120), sampling=make_sampling(max_tokens=30)))
    drive(engine, {}, num_steps=1)
    for first in (200, 400, 600, 800):
        engine.add(make_request(str(first), range(first, first + 120), sampling=make_sampling(max_tokens=30)))
    drive(engine, {}, num_steps=10)
    # Four short prompts, three and two are allowed 80 ms beside a step's own 10, the last one 40.
    mixed = [(step.num_generating, step.num_prompt_tokens) for step in runner.steps[1:]]
    assert mixed == [(1, 0), (1, 64), (1, 80), (2, 80), (2, 80), (3, 80), (4, 40), (4, 40), (4, 16), (5, 0)]


def test_a_short_prompt_is_computed_in_few_long_steps_and_the_end_of_a_long_one_in_many_short_ones() -> None:
    for num_tokens, wanted_steps in ((100, [32, 40, 28]), (130, [8] * 16 + [2])):
        engine, runner = make_experienced_engine()
        engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
        drive(engine, {}, num_steps=2)
        engine.add(make_request("prompt", range(200, 200 + num_tokens), sampling=make_sampling(max_tokens=1)))
        drive(engine, {}, num_steps=len(wanted_steps))
        assert [step.num_prompt_tokens for step in runner.steps[-len(wanted_steps) :]] == wanted_steps


def test_cached_tokens_do_not_make_a_prompt_long_neither_before_it_runs_nor_then() -> None:
    engine, runner = make_experienced_engine()
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    engine.add(make_request("cached", range(2000, 2100), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=10)
    engine.add(make_request("prompt", range(2000, 2170), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=2)
    assert [step.num_prompt_tokens for step in runner.steps[-2:]] == [32, 38]


def test_a_prompt_that_is_scored_is_as_long_as_all_of_it() -> None:
    engine, runner = make_experienced_engine()
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    engine.add(make_request("cached", range(2000, 2140), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=20)
    engine.add(make_request("prompt", range(2000, 2140), sampling=make_sampling(max_tokens=1, num_prompt_logprobs=0)))
    drive(engine, {}, num_steps=2)
    assert [step.num_prompt_tokens for step in runner.steps[-2:]] == [8, 8]


def test_a_prompt_that_may_not_run_yet_does_not_count() -> None:
    engine, runner = make_experienced_engine()
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=2)
    engine.add(make_request("paused", range(200, 240), credit=0))
    engine.add(make_request("long", range(400, 600), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=2)
    assert [step.num_prompt_tokens for step in runner.steps[-2:]] == [8, 8]


def test_prompts_of_one_token_do_not_count_beside_a_long_one() -> None:
    engine, runner = make_experienced_engine()
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=2)
    engine.add(make_request("long", range(400, 600), sampling=make_sampling(max_tokens=1)))
    for number in range(3):
        engine.add(make_request(str(number), (number,)))
    drive(engine, {}, num_steps=1)
    assert runner.steps[-1].num_prompt_tokens == 8


def test_a_prompt_that_is_computed_elsewhere_does_not_count() -> None:
    runner = ModelledRunner(linear)
    source = FakeSource(runner, block_size=BLOCK_SIZE)
    source.offering = {RequestId("elsewhere")}
    limits = make_limits(max_batch_tokens=128, max_slowdown=2.0)
    engine = Engine(
        runner, num_blocks=300, hasher=make_hasher(), limits=limits, source=source, clock=lambda: runner.now
    )
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=5)
    engine.add(make_request("elsewhere", range(200, 240)))
    drive(engine, {}, num_steps=1)
    engine.add(make_request("long", range(400, 600), sampling=make_sampling(max_tokens=1)))
    source.ready(*source.attempts)  # it waits for blocks when the next step is planned
    drive(engine, {}, num_steps=2)
    assert [step.num_prompt_tokens for step in runner.steps[-2:]] == [4, 8]


def test_without_streams_a_prompt_that_goes_on_is_computed_in_full_chunks() -> None:
    engine, runner = make_experienced_engine()
    engine.add(make_request("long", range(400, 700), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=3)
    assert [step.num_prompt_tokens for step in runner.steps[-3:]] == [128, 128, 44]


def test_without_streams_the_ninth_prompt_waits_however_long_it_is() -> None:
    engine, runner = make_experienced_engine(max_sequences=9)
    for number in range(8):
        prompt = range(200 * number, 200 * number + 20)
        engine.add(make_request(str(number), prompt, sampling=make_sampling(max_tokens=1)))
    engine.add(make_request("ninth", range(2000, 2120), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=1)
    assert runner.steps[-1].num_prompt_tokens == 75


def test_without_streams_the_first_of_a_burst_have_their_tokens_while_the_others_are_computed() -> None:
    engine, runner = make_experienced_engine()
    names = [str(number) for number in range(6)]
    for number, name in enumerate(names):
        engine.add(make_request(name, range(200 * number, 200 * number + 20), sampling=make_sampling(max_tokens=1)))
    tokens: dict[str, list[int]] = {}
    drive(engine, tokens, num_steps=1)
    assert (list(tokens), runner.steps[-1].num_prompt_tokens) == (names[:3], 75)
    drive(engine, tokens, num_steps=1)
    assert (list(tokens), runner.steps[-1].num_prompt_tokens) == (names, 45)


def test_without_streams_a_burst_behind_a_cached_prefix_counts_by_what_is_not_cached() -> None:
    engine, runner = make_experienced_engine()
    engine.add(make_request("cached", range(2000, 2100), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=1)
    for first in range(200, 320, 20):
        prompt = (*range(2000, 2100), *range(first, first + 20))
        engine.add(make_request(str(first), prompt, sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=2)
    assert [step.num_prompt_tokens for step in runner.steps[-2:]] == [74, 46]


def test_the_first_stream_of_an_engine_waits_for_no_prompt_once_and_the_prompt_one_step() -> None:
    engine, runner = make_modelled(max_slowdown=2.0)
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=1)
    engine.add(make_request("long", range(400, 700), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=3)
    assert [step.num_prompt_tokens for step in runner.steps[1:]] == [0, 4, 8]


def test_a_prompt_of_one_token_joins_streams_at_once() -> None:
    engine, runner = make_modelled()
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=3)
    engine.add(make_request("short", (7,)))
    drive(engine, {}, num_steps=1)
    assert (runner.steps[-1].num_generating, runner.steps[-1].num_prompt_tokens) == (2, 0)


def test_an_engine_tells_its_pacer_how_long_steps_take() -> None:
    engine, runner = make_modelled(max_slowdown=9.0)
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=10)
    engine.add(make_request("long", range(400, 700), sampling=make_sampling(max_tokens=1)))
    drive(engine, {}, num_steps=5)
    assert [step.num_prompt_tokens for step in runner.steps[10:]] == [24, 32, 40, 48, 56]


def test_a_prefill_is_not_slowed_by_the_last_token_of_another() -> None:
    engine, runner = make_modelled(max_batch_tokens=BLOCK_SIZE * 8)
    engine.add(make_prefill("a", tuple(range(BLOCK_SIZE * 8 + 1))))
    engine.add(make_prefill("b", tuple(range(500, 500 + BLOCK_SIZE * 7))))
    drive(engine, {}, num_steps=2)
    assert [(step.num_generating, step.num_prompt_tokens) for step in runner.steps] == [(0, 32), (1, 28)]


def test_tokens_do_not_depend_on_how_long_steps_take() -> None:
    for seed in range(5):
        draw = random.Random(seed)
        engine, runner = make_modelled()
        runner._machine = lambda *_, draw=draw: draw.expovariate(50)
        requests = [
            make_request(f"{seed}-{number}", tuple(range(number, number + 70)), sampling=make_sampling(max_tokens=20))
            for number in range(6)
        ]
        tokens: dict[str, list[int]] = {}
        for request in requests:
            engine.add(request)
            drive(engine, tokens, num_steps=7)
        drive(engine, tokens, num_steps=500)
        assert tokens == {request.request_id: wanted(request) for request in requests}
        engine.check_integrity()


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many hashes each look into the prefix cache brought along."""
    found: list[int] = []
    match = PrefixCache.match

    def noted(self: PrefixCache, chain: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        found.append(len(chain))
        return match(self, chain)

    monkeypatch.setattr(PrefixCache, "match", noted)
    return found


def test_a_plan_looks_once_for_what_is_cached_of_a_prompt(matched: list[int]) -> None:
    engine, runner = make_modelled(max_slowdown=9.0)
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=3)
    matched.clear()
    for first in (200, 300, 400):
        engine.add(make_request(str(first), range(first, first + 8)))
    drive(engine, {}, num_steps=1)
    assert (runner.steps[-1].num_prompt_tokens, matched) == (24, [1, 1, 1])


def test_a_very_long_prompt_is_not_hashed_before_its_turn(matched: list[int]) -> None:
    runner = ModelledRunner(linear)
    limits = make_limits(max_model_len=10_000, max_slowdown=2.0)
    engine = Engine(runner, num_blocks=5000, hasher=make_hasher(), limits=limits, clock=lambda: runner.now)
    engine.add(make_request("stream", range(100, 106), sampling=make_sampling(max_tokens=200)))
    drive(engine, {}, num_steps=3)
    matched.clear()
    engine.add(make_request("first", range(4097)))
    engine.add(make_request("second", range(4097)))
    engine.add(make_request("third", range(4096)))
    drive(engine, {}, num_steps=1)
    assert matched == [1023, 1024]  # the third for its length, the first because it joins


def test_an_engine_that_bounds_no_step_looks_for_nothing_before_its_turn(matched: list[int]) -> None:
    engine, _ = make_modelled(max_slowdown=math.inf, max_batch_tokens=16)
    for first in (200, 300, 400):
        engine.add(make_request(str(first), range(first, first + 40)))
    drive(engine, {}, num_steps=1)
    assert matched == [9]
