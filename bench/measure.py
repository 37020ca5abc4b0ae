"""Runs workloads against several servers in turns, and sums up what came of it.

In every round each server gets its own prompts of equal sizes, one server after the other: a machine that drifts over
minutes drifts for all. Ratios are taken round by round, against the first server. A turn begins with one short request
that is not timed, for every server alike: caches that another one emptied are no property of this one.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.freeze import Turns
from bench.load import run_phase
from bench.record import Figures, Slo, figures, medians, ratios
from bench.table import format_table
from bench.target import Target, TargetError
from bench.workload import SHARE_OF_CAPACITY, W4, Workload, plan_round

WAKE_S: Final = 30.0
"""How long a server may take until it answers when its turn begins: one that was stopped finds its own connections
timed out, and makes new ones."""
_WAKE_AGAIN_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `rate` is W4's, in requests per second; None takes a share of the first server's capacity.

    `seed` is of this run alone, or prompts of an earlier run would be found in prefix caches.
    """

    workloads: tuple[Workload, ...]
    rounds: int
    rate: float | None
    slo: Slo
    seed: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One phase on one server: the figures of every round."""

    phase: str
    target: str
    rounds: tuple[Figures, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """All of a run. `rate` is the one that W4 had, 0 without W4; `frozen` are the servers that were stopped outside
    their turns."""

    results: tuple[PhaseResult, ...]
    rate: float
    seed: int
    frozen: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Observer:
    """Who is told how a run goes on: `say` gets lines for people; `between` gets the workload's name before its first
    round and after every one, while every server idles or is stopped."""

    say: Callable[[str], None]
    between: Callable[[str], None] = lambda _: None


async def measure(targets: Sequence[Target], plan: Plan, observer: Observer, turns: Turns) -> Measurement:
    """Opens `targets`, at least one, runs every workload, closes them. Raises TargetError when one fails."""
    results: list[PhaseResult] = []
    rate = 0.0
    try:
        with turns:
            for target in targets:
                with turns.turn(target.name):
                    await _wake(target, plan, "opening")
            for workload in plan.workloads:
                if workload.name == W4.name and workload.rate is None:
                    rate = plan.rate or SHARE_OF_CAPACITY * await _capacity(targets[0], workload, plan, turns)
                    observer.say(f"{workload.name}: {rate:.2f} requests per second")
                    workload = workload.at_rate(rate)
                results += await _alternate(targets, workload, plan, observer, turns)
        return Measurement(tuple(results), rate, plan.seed, turns.frozen)
    finally:
        for target in targets:
            await target.close()


async def _wake(target: Target, plan: Plan, turn: str) -> None:
    """One short request to a server that answers. Raises TargetError when none has succeeded after WAKE_S."""
    workload = Workload(name="warm-up", prompt_tokens=16, output_tokens=4)
    end = time.monotonic() + WAKE_S
    attempt = 0
    while True:
        seed = f"{plan.seed}/{turn}/{attempt}/{target.name}"
        (phase,) = plan_round(workload, seed=seed, vocab_size=plan.vocab_size)
        try:
            await target.open()
            await run_phase(target, phase)
        except TargetError:
            if turn == "opening" or time.monotonic() > end:
                raise
            await asyncio.sleep(_WAKE_AGAIN_S)
            attempt += 1
        else:
            return


async def _capacity(target: Target, workload: Workload, plan: Plan, turns: Turns) -> float:
    """Requests per second that `workload` reaches as a closed loop."""
    (phase,) = plan_round(workload, seed=f"{plan.seed}/capacity", vocab_size=plan.vocab_size)
    with turns.turn(target.name):
        await _wake(target, plan, "capacity")
        run = await run_phase(target, phase)
    return figures(run.records, slo=plan.slo, client_cpu_s=run.client_cpu_s).requests_per_s


async def _alternate(
    targets: Sequence[Target], workload: Workload, plan: Plan, observer: Observer, turns: Turns
) -> list[PhaseResult]:
    rounds: dict[tuple[str, str], list[Figures]] = {
        (phase, target.name): [] for phase in workload.phase_names for target in targets
    }
    observer.between(workload.name)
    for number in range(plan.rounds):
        for target in targets:
            phases = plan_round(workload, seed=f"{plan.seed}/{number}/{target.name}", vocab_size=plan.vocab_size)
            with turns.turn(target.name):
                await _wake(target, plan, f"{workload.name}/{number}")
                for phase in phases:
                    run = await run_phase(target, phase)
                    found = figures(run.records, slo=plan.slo, client_cpu_s=run.client_cpu_s)
                    rounds[phase.name, target.name].append(found)
        observer.say(f"{workload.name}: round {number + 1} of {plan.rounds}")
        observer.between(workload.name)
    return [PhaseResult(phase, target, tuple(found)) for (phase, target), found in rounds.items()]


_COLUMNS = {
    "TTFT p50 ms": "ttft_p50_ms",
    "p99": "ttft_p99_ms",
    "TPOT p50 ms": "tpot_p50_ms",
    "ITL p50 ms": "itl_p50_ms",
    "ITL p99": "itl_p99_ms",
    "tokens/s": "output_tokens_per_s",
    "requests/s": "requests_per_s",
    "goodput/s": "goodput_per_s",
    "client µs/token": "client_us_per_token",
}
_RATIOS = {"TTFT ×": "ttft_p50_ms", "TPOT ×": "tpot_p50_ms", "tokens/s ×": "output_tokens_per_s"}


def measurement_table(measurement: Measurement) -> str:
    """Medians over rounds, and the median of each round's ratio to the first server."""
    first = {result.phase: result for result in reversed(measurement.results)}
    rows = []
    for result in measurement.results:
        middle = medians(result.rounds)
        base = first[result.phase]
        ratio = [
            None if result is base else statistics.median(ratios(_series(result, name), _series(base, name)))
            for name in _RATIOS.values()
        ]
        rows.append([result.phase, result.target, *(getattr(middle, name) for name in _COLUMNS.values()), *ratio])
    return format_table(("phase", "server", *_COLUMNS, *_RATIOS), rows)


def conditions(measurement: Measurement) -> str:
    """One line that tells how the table came about: what repeats it, and who was stopped meanwhile."""
    frozen = ", ".join(measurement.frozen) or "none"
    return f"  seed {measurement.seed}; stopped outside their turns: {frozen}"


def _series(result: PhaseResult, name: str) -> list[float]:
    return [getattr(each, name) for each in result.rounds]
