"""Runs workloads against several servers in turns, and sums up what came of it.

In every round each server gets its own prompts of equal sizes, one server after the other: a machine that drifts over
minutes drifts for all. Ratios are taken round by round, against the first server.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.load import run_phase
from bench.record import Figures, Slo, figures, medians, ratios
from bench.table import format_table
from bench.target import Target
from bench.workload import SHARE_OF_CAPACITY, W4, Workload, plan_round


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `rate` is W4's, in requests per second; None takes a share of the first server's capacity."""

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
    """All of a run. `rate` is the one that W4 had, 0 without W4."""

    results: tuple[PhaseResult, ...]
    rate: float


@dataclass(frozen=True, slots=True)
class Observer:
    """Who is told how a run goes on: `say` gets lines for people, `between` is called when a round is over and every
    server idles."""

    say: Callable[[str], None]
    between: Callable[[], None] = lambda: None


async def measure(targets: Sequence[Target], plan: Plan, observer: Observer) -> Measurement:
    """Opens `targets`, at least one, runs every workload, closes them. Raises TargetError when one fails."""
    try:
        for target in targets:
            await target.open()
            await _warm_up(target, plan)
        results: list[PhaseResult] = []
        rate = 0.0
        for workload in plan.workloads:
            if workload.name == W4.name and workload.rate is None:
                rate = plan.rate or SHARE_OF_CAPACITY * await _capacity(targets[0], workload, plan)
                observer.say(f"{workload.name}: {rate:.2f} requests per second")
                results += await _alternate(targets, workload.at_rate(rate), plan, observer)
            else:
                results += await _alternate(targets, workload, plan, observer)
        return Measurement(tuple(results), rate)
    finally:
        for target in targets:
            await target.close()


async def _warm_up(target: Target, plan: Plan) -> None:
    """One short request: whatever a server does only once is over."""
    workload = Workload(name="warm-up", prompt_tokens=16, output_tokens=4)
    (phase,) = plan_round(workload, seed=f"{plan.seed}/{target.name}", vocab_size=plan.vocab_size)
    await run_phase(target, phase)


async def _capacity(target: Target, workload: Workload, plan: Plan) -> float:
    """Requests per second that `workload` reaches as a closed loop."""
    (phase,) = plan_round(workload, seed=f"{plan.seed}/capacity", vocab_size=plan.vocab_size)
    run = await run_phase(target, phase)
    return figures(run.records, slo=plan.slo, client_cpu_s=run.client_cpu_s).requests_per_s


async def _alternate(
    targets: Sequence[Target], workload: Workload, plan: Plan, observer: Observer
) -> list[PhaseResult]:
    rounds: dict[tuple[str, str], list[Figures]] = {
        (phase, target.name): [] for phase in workload.phase_names for target in targets
    }
    for number in range(plan.rounds):
        for target in targets:
            seed = f"{plan.seed}/{number}/{target.name}"
            for phase in plan_round(workload, seed=seed, vocab_size=plan.vocab_size):
                run = await run_phase(target, phase)
                found = figures(run.records, slo=plan.slo, client_cpu_s=run.client_cpu_s)
                rounds[phase.name, target.name].append(found)
        observer.say(f"{workload.name}: round {number + 1} of {plan.rounds}")
        observer.between()
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


def _series(result: PhaseResult, name: str) -> list[float]:
    return [getattr(each, name) for each in result.rounds]
