"""The table of bars: what a CPU server must reach beside this machine's limits and beside its peers. Pure.

Every ratio is taken round by round, between figures that the same run measured within seconds of each other, and a bar
is met by the median round.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from bench.limits import Limits
from bench.measure import Measurement
from bench.model_costs import Arithmetic, ModelCosts
from bench.table import format_cell, format_table
from bench.workload import W1, W2, W3, W4


class Sense(Enum):
    """On which side of its bound a ratio must be; the value is how tables write it."""

    AT_MOST = "≤"
    AT_LEAST = "≥"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """What is demanded of one arithmetic. Ratios are ours to the limit's or the peer's."""

    decode_times_floor: float
    """W1's time per output token, in times that its weights take at the measured read bandwidth."""
    prefill_share: float
    """W1's operations per second up to the first token, as a share of `gemm`."""
    gemm: Callable[[Limits], float]
    tokens_times_peer: float
    cold_times_peer: float
    """W3's time to first token."""
    warm_times_cold: float | None
    """W3's, to its own cold phase."""
    tail_times_peer: float
    """W4's 99th percentiles of time to first token and of gaps."""


DEMANDS: Final = {
    Arithmetic.BF16: Demands(
        decode_times_floor=1.15,
        prefill_share=0.75,
        gemm=lambda limits: limits.gemm_float32,
        tokens_times_peer=1.9,
        cold_times_peer=1 / 1.9,
        warm_times_cold=1 / 8,
        tail_times_peer=0.5,
    ),
    Arithmetic.INT8: Demands(
        decode_times_floor=1.3,
        prefill_share=0.65,
        gemm=lambda limits: limits.gemm_int8,
        tokens_times_peer=1.4,
        cold_times_peer=1 / 1.3,
        warm_times_cold=None,
        tail_times_peer=0.75,
    ),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of one server: our figures and those beside them, round by round."""

    name: str
    server: str
    ours: tuple[float, ...]
    beside_name: str
    beside: tuple[float, ...]
    sense: Sense
    bound: float

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours to the other, round by round."""
        return tuple(ours / beside for ours, beside in zip(self.ours, self.beside, strict=True))

    @property
    def is_met(self) -> bool:
        """Whether the median ratio is on its side of the bound."""
        ratio = statistics.median(self.ratios)
        return ratio <= self.bound if self.sense is Sense.AT_MOST else ratio >= self.bound


class _Figures:
    """Figures of one measurement, found by phase, server and name; nothing where the phase was not measured."""

    def __init__(self, measurement: Measurement) -> None:
        self._rounds = {(result.phase, result.target): result.rounds for result in measurement.results}

    def series(self, phase: str, server: str, name: str) -> tuple[float, ...]:
        return tuple(getattr(each, name) for each in self._rounds.get((phase, server), ()))


def limit_bars(measurement: Measurement, *, server: str, costs: ModelCosts, limits: Sequence[Limits]) -> list[Bar]:
    """W1 of one server beside what the machine could do in each of its rounds; nothing without `limits`."""
    demands, figures = DEMANDS[costs.arithmetic], _Figures(measurement)
    tpot = figures.series(W1.name, server, "tpot_p50_ms")
    ttft = figures.series(W1.name, server, "ttft_p50_ms")
    floor = tuple(costs.decode_bytes / each.read / 1e6 for each in limits)
    reached = tuple(costs.prefill_flops(W1.prompt_tokens) / each / 1e6 for each in ttft)
    gemm = tuple(demands.gemm(each) for each in limits)
    decode = ("W1 TPOT ms", server, tpot, "weights at read bandwidth", floor)
    prefill = ("W1 TTFT as GOP/s", server, reached, f"{_gemm_name(costs)} GEMM", gemm)
    bars = [
        Bar(*decode, Sense.AT_MOST, demands.decode_times_floor),
        Bar(*prefill, Sense.AT_LEAST, demands.prefill_share),
    ]
    return [bar for bar in bars if bar.ours and bar.beside]


def peer_bars(measurement: Measurement, *, server: str, peer: str, arithmetic: Arithmetic) -> list[Bar]:
    """One server beside another that computes alike."""
    demands, figures = DEMANDS[arithmetic], _Figures(measurement)
    cold, _ = W3.phase_names
    demanded = (
        ("W2 tokens/s", W2.name, "output_tokens_per_s", Sense.AT_LEAST, demands.tokens_times_peer),
        ("W3 cold TTFT ms", cold, "ttft_p50_ms", Sense.AT_MOST, demands.cold_times_peer),
        ("W4 p99 TTFT ms", W4.name, "ttft_p99_ms", Sense.AT_MOST, demands.tail_times_peer),
        ("W4 p99 ITL ms", W4.name, "itl_p99_ms", Sense.AT_MOST, demands.tail_times_peer),
    )
    bars = [
        Bar(name, server, figures.series(phase, server, of), peer, figures.series(phase, peer, of), sense, bound)
        for name, phase, of, sense, bound in demanded
    ]
    return [bar for bar in bars if bar.ours]


def own_bars(measurement: Measurement, *, server: str, arithmetic: Arithmetic) -> list[Bar]:
    """One server beside itself: what its prefix cache is worth."""
    bound, figures = DEMANDS[arithmetic].warm_times_cold, _Figures(measurement)
    cold, warm = (figures.series(phase, server, "ttft_p50_ms") for phase in W3.phase_names)
    return [Bar("W3 warm TTFT ms", server, warm, "its own cold", cold, Sense.AT_MOST, bound)] if bound and cold else []


def bars_table(bars: Sequence[Bar]) -> str:
    """The bars for people: medians, with the lowest and highest round behind them."""
    headers = ("bar", "server", "ours", "limit or peer", "its", "ratio", "demanded", "met")
    rows = [
        (
            bar.name,
            bar.server,
            _spread(bar.ours),
            bar.beside_name,
            _spread(bar.beside),
            _spread(bar.ratios),
            f"{bar.sense.value} {format_cell(bar.bound)}",
            "yes" if bar.is_met else "no",
        )
        for bar in bars
    ]
    return format_table(headers, rows)


def bar_fields(bar: Bar) -> dict[str, object]:
    """One bar as JSON has it."""
    return {
        "name": bar.name,
        "server": bar.server,
        "ours": bar.ours,
        "beside_name": bar.beside_name,
        "beside": bar.beside,
        "ratio": statistics.median(bar.ratios),
        "demanded": f"{bar.sense.value} {bar.bound:.4g}",
        "is_met": bar.is_met,
    }


def _spread(values: Sequence[float]) -> str:
    middle = format_cell(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({format_cell(min(values))}–{format_cell(max(values))})"


def _gemm_name(costs: ModelCosts) -> str:
    return "float32" if costs.arithmetic is Arithmetic.BF16 else "int8"
