"""What a client saw of one request, and the figures of many. Pure: times in, figures out.

All times are seconds of one clock. Latencies begin when a request was *due*: a load generator or server that falls
behind must not hide the wait.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Record:
    """One request that was answered in full. `arrivals` are the moments at which output came, at least one."""

    due_s: float
    arrivals: tuple[float, ...]
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for one token."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """The gaps between arrivals."""
        return tuple(later - earlier for earlier, later in pairwise(self.arrivals))


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must meet to count as good, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one phase. Milliseconds, but for rates, which are per second of the phase."""

    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    output_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float
    """Requests per second that met the SLO."""
    client_us_per_token: float
    """Processor time of the load generator for each output token, in microseconds."""


FIGURE_NAMES = tuple(field.name for field in fields(Figures))


def figures(records: Sequence[Record], *, slo: Slo, client_cpu_s: float) -> Figures:
    """Sums up one phase's records, at least one; the phase lasts from the first due request to the last arrival."""
    duration_s = max(record.arrivals[-1] for record in records) - min(record.due_s for record in records)
    ttft, tpot = [record.ttft_s * 1e3 for record in records], [record.tpot_s * 1e3 for record in records]
    itl = [gap * 1e3 for record in records for gap in record.itl_s] or [0.0]
    tokens = sum(record.output_tokens for record in records)
    good = sum(record.ttft_s <= slo.ttft_s and record.tpot_s <= slo.tpot_s for record in records)
    return Figures(
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p99_ms=percentile(ttft, 99),
        tpot_p50_ms=percentile(tpot, 50),
        tpot_p99_ms=percentile(tpot, 99),
        itl_p50_ms=percentile(itl, 50),
        itl_p99_ms=percentile(itl, 99),
        output_tokens_per_s=tokens / duration_s,
        requests_per_s=len(records) / duration_s,
        goodput_per_s=good / duration_s,
        client_us_per_token=client_cpu_s / tokens * 1e6,
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over rounds, at least one."""
    return Figures(*(statistics.median(getattr(each, name) for each in rounds) for name in FIGURE_NAMES))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of `values` lie, between neighbours in proportion. At least one value."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round, so that a machine that drifts over minutes drifts for both. 0 where there is nothing to divide
    by."""
    return [above / below if below else 0.0 for above, below in zip(numerators, denominators, strict=True)]
