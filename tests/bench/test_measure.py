"""Load and measurement against targets without a server: order, concurrency, due times, ratios, the table."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from bench.freeze import Turns
from bench.load import run_phase
from bench.measure import Observer, Plan, measure, measurement_table
from bench.record import Record, Slo
from bench.target import Answer, TargetError
from bench.workload import W3, W4, Phase, PlannedRequest, Workload
from tests.bench.processes import parent_and_child, states
from tests.loop import run

SLO = Slo(1.0, 1.0)


@dataclass
class DoneAnswer:
    """An answer that took `seconds` for each of its tokens."""

    due_s: float
    seconds: float
    output_tokens: int

    def record(self) -> Record:
        arrivals = [self.due_s + self.seconds * (index + 1) for index in range(self.output_tokens)]
        return Record(self.due_s, tuple(arrivals), self.output_tokens)


@dataclass
class FakeTarget:
    """Answers after a few turns of the loop, and remembers what was asked when."""

    name: str
    log: list[str] = field(default_factory=list)
    seconds: float = 0.01
    fails_at: int = -1
    prompts: list[Sequence[int]] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0
    is_open: bool = False

    async def open(self) -> None:
        self.is_open = True

    async def complete(self, prompt: Sequence[int], output_tokens: int, *, due_s: float) -> Answer:
        if len(self.prompts) == self.fails_at:
            raise TargetError("it broke")
        self.prompts.append(prompt)
        self.log.append(self.name)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        for _ in range(3):
            await asyncio.sleep(0)
        self.num_running -= 1
        return DoneAnswer(due_s, self.seconds, output_tokens)

    async def close(self) -> None:
        self.is_open = False


def make_phase(count: int, concurrency: int | None, *, gap_s: float = 0.0) -> Phase:
    return Phase("phase", tuple(PlannedRequest(gap_s * index, (index,)) for index in range(count)), concurrency, 2)


def make_plan(*workloads: Workload, rounds: int = 2, rate: float | None = None) -> Plan:
    return Plan(workloads=workloads, rounds=rounds, rate=rate, slo=SLO, seed=1, vocab_size=1000)


SILENT = Observer(lambda _: None)
ALWAYS = Turns({})


def test_a_closed_loop_never_runs_more_than_its_concurrency_and_sends_everything() -> None:
    target = FakeTarget("a")
    done = run(run_phase(target, make_phase(20, 4)))
    assert target.most_running == 4
    assert sorted(map(tuple, target.prompts)) == [(index,) for index in range(20)]
    assert len(done.records) == 20
    assert done.client_cpu_s >= 0.0


def test_an_open_loop_sends_when_due_and_counts_from_then() -> None:
    target = FakeTarget("a")
    before = time.perf_counter()
    done = run(run_phase(target, make_phase(3, None, gap_s=0.02)))
    due = [record.due_s - done.records[0].due_s for record in done.records]
    assert due == pytest.approx([0.0, 0.02, 0.04], abs=1e-6)
    assert time.perf_counter() - before >= 0.04


@pytest.mark.parametrize("concurrency", [2, None])
def test_one_failure_ends_the_phase_with_its_cause(concurrency: int | None) -> None:
    with pytest.raises(TargetError, match="it broke"):
        run(run_phase(FakeTarget("a", fails_at=2), make_phase(6, concurrency)))


def test_servers_take_turns_in_every_round() -> None:
    log: list[str] = []
    targets = [FakeTarget("a", log), FakeTarget("b", log)]
    one = Workload(name="one", prompt_tokens=4, output_tokens=2, num_requests=2, concurrency=1)
    run(measure(targets, make_plan(one, rounds=2), Observer(log.append, log.append), ALWAYS))
    opening, turn = ["a", "b"], ["a", "a", "a", "b", "b", "b"]  # a turn begins with a request that is not counted
    rounds = [[*turn, f"one: round {number} of 2", "one"] for number in (1, 2)]
    assert log == [*opening, "one", *rounds[0], *rounds[1]]
    assert not any(target.is_open for target in targets)


def test_no_prompt_is_sent_twice() -> None:
    targets = [FakeTarget("a"), FakeTarget("b")]
    one = Workload(name="one", prompt_tokens=8, output_tokens=1, num_requests=3, concurrency=3)
    run(measure(targets, make_plan(one, rounds=3), SILENT, ALWAYS))
    prompts = [tuple(prompt) for target in targets for prompt in target.prompts]
    assert len(set(prompts)) == len(prompts) == 2 * (1 + 3 * (1 + 3))


def test_both_phases_of_a_shared_beginning_are_reported_for_every_server() -> None:
    measurement = run(measure([FakeTarget("a"), FakeTarget("b")], make_plan(W3), SILENT, ALWAYS))
    named = [(result.phase, result.target, len(result.rounds)) for result in measurement.results]
    assert named == [("W3 cold", "a", 2), ("W3 cold", "b", 2), ("W3 warm", "a", 2), ("W3 warm", "b", 2)]


@pytest.mark.parametrize("given", [None, 500.0])
def test_poisson_arrivals_come_at_the_given_rate_or_a_share_of_the_firsts_capacity(given: float | None) -> None:
    small = Workload(name=W4.name, prompt_tokens=4, output_tokens=2, num_requests=8, concurrency=8)
    first, said = FakeTarget("a"), list[str]()
    measurement = run(
        measure([first, FakeTarget("b")], make_plan(small, rounds=1, rate=given), Observer(said.append), ALWAYS)
    )
    # Eight at a time, each done in 20 ms of its own making: 400 per second at most, less what sending takes.
    assert measurement.rate == given or 0.0 < measurement.rate <= 240.0
    assert said[0] == f"W4: {measurement.rate:.2f} requests per second"
    assert len(first.prompts) == 1 + 9 + (9 if given is None else 0)


@dataclass
class WatchingTarget(FakeTarget):
    """Notes who runs while it is asked: its own process, then the other's."""

    watched: tuple[int, ...] = ()

    async def complete(self, prompt: Sequence[int], output_tokens: int, *, due_s: float) -> Answer:
        self.log.append(states(*self.watched))
        return await super().complete(prompt, output_tokens, due_s=due_s)


def test_whoever_is_frozen_runs_while_it_is_asked_and_at_no_other_time() -> None:
    small = Workload(name=W4.name, prompt_tokens=4, output_tokens=2)
    log: list[str] = []
    with parent_and_child() as (one, _), parent_and_child() as (other, _):
        a = WatchingTarget("a", log, watched=(one, other))
        b = WatchingTarget("b", log, watched=(other, one))
        watch = Observer(lambda _: None, lambda _: log.append(states(one, other)))
        measurement = run(measure([a, b], make_plan(small, rounds=1), watch, Turns({"a": one, "b": other})))
        assert states(one, other) == "rr"
    assert (measurement.frozen, measurement.seed) == (("a", "b"), 1)
    asked = [each for each in log if each not in "ab"]
    opening, capacity, turns = ["rT"] * 2, ["rT"] * 2, ["rT"] * 4
    assert asked == [*opening, *capacity, "TT", *turns, "TT"]


@dataclass
class SlowToWake(FakeTarget):
    """Fails so many times after it has been opened by its first request."""

    num_failures: int = 0

    async def complete(self, prompt: Sequence[int], output_tokens: int, *, due_s: float) -> Answer:
        if self.prompts and self.num_failures:
            self.num_failures -= 1
            raise TargetError("not yet")
        return await super().complete(prompt, output_tokens, due_s=due_s)


def test_a_turn_begins_when_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure._WAKE_AGAIN_S", 0.0)
    target = SlowToWake("a", num_failures=3)
    one = Workload(name="one", prompt_tokens=4, output_tokens=2)
    measurement = run(measure([target], make_plan(one, rounds=1), SILENT, ALWAYS))
    assert len(measurement.results[0].rounds) == 1
    assert [len(prompt) for prompt in target.prompts] == [16, 16, 4]


def test_a_server_that_answers_no_more_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.WAKE_S", -1.0)
    one = Workload(name="one", prompt_tokens=4, output_tokens=2)
    with pytest.raises(TargetError, match="not yet"):
        run(measure([SlowToWake("a", num_failures=1)], make_plan(one), SILENT, ALWAYS))


def test_two_runs_send_no_prompt_alike_unless_they_have_one_seed() -> None:
    def sent(seed: int) -> set[tuple[int, ...]]:
        target = FakeTarget("a")
        plan = replace(make_plan(W3, Workload(name=W4.name, prompt_tokens=8, output_tokens=1)), seed=seed)
        run(measure([target], plan, SILENT, ALWAYS))
        return {tuple(prompt[:16]) for prompt in target.prompts}

    assert not sent(1) & sent(2)
    assert sent(3) == sent(3)


def test_targets_are_closed_when_one_fails() -> None:
    targets = [FakeTarget("a"), FakeTarget("b", fails_at=0)]
    with pytest.raises(TargetError, match="it broke"):
        run(measure(targets, make_plan(), SILENT, ALWAYS))
    assert not any(target.is_open for target in targets)


def test_the_table_compares_with_the_first_server() -> None:
    one = Workload(name="one", prompt_tokens=4, output_tokens=2)
    targets = [FakeTarget("slow", seconds=0.02), FakeTarget("fast", seconds=0.01)]
    table = measurement_table(run(measure(targets, make_plan(one), SILENT, ALWAYS))).splitlines()
    slow, fast = table[2].split(), table[3].split()
    assert slow[:3] == ["one", "slow", "20.0"]
    assert slow[-3:] == ["–", "–", "–"]
    assert fast[:3] == ["one", "fast", "10.0"]
    assert fast[-3:] == ["0.500", "0.500", "2.00"]
