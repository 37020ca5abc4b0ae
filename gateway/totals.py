"""The metrics of a gateway of several processes: its children's pages added up, those of ended children included.

A counter never falls: what an ended child counted, as far as it last told, stays in the sum. Each gauge says here how
the processes' values become one. Pure, but for the sum it keeps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_Labels = tuple[tuple[str, str], ...]

_GAUGES: Final[Mapping[str, Callable[[float, float], float]]] = {
    # What every process reads from the same reports.
    "vllm:kv_cache_usage_perc": max,
    "staffetta_kv_blocks": max,
    # Open everywhere, or a request may come to a process that cannot send it on.
    "staffetta_sessions": min,
    "staffetta_engine_stalled": max,
}
"""How two processes' values of a gauge become one; of those that are not named: the sum."""


class _Family(NamedTuple):
    documentation: str
    kind: str
    values: dict[tuple[str, _Labels], float]


class Totals:
    """What the processes counted, together."""

    def __init__(self) -> None:
        self._ended: dict[str, _Family] = {}

    def retire(self, page: bytes) -> None:
        """Keeps the counts on the last page of a process that has ended."""
        counted = ((name, family) for name, family in _read(page) if family.kind in ("counter", "histogram"))
        _add(self._ended, counted)

    def page(self, pages: Iterable[bytes], own: Iterable[Metric]) -> bytes:
        """The page of all, for a scraper: those of the living processes, and what the parent itself tells."""
        total: dict[str, _Family] = {}
        _add(total, self._ended.items())
        for page in pages:
            _add(total, _read(page))
        registry = CollectorRegistry()
        registry.register(_Fixed([*_metrics(total), *own]))
        return generate_latest(registry)


class _Fixed(Collector):
    """Metrics that are what they are."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Nothing: nobody asks for names before the values."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        return self._metrics


def _read(page: bytes) -> Iterator[tuple[str, _Family]]:
    for metric in text_string_to_metric_families(page.decode()):
        values = {(sample.name, tuple(sorted(sample.labels.items()))): float(sample.value) for sample in metric.samples}
        yield metric.name, _Family(metric.documentation, metric.type, values)


def _add(total: dict[str, _Family], families: Iterable[tuple[str, _Family]]) -> None:
    for name, family in families:
        one = total.setdefault(name, _Family(family.documentation, family.kind, {}))
        join = _GAUGES.get(name, float.__add__)
        for key, value in family.values.items():
            one.values[key] = join(one.values[key], value) if key in one.values else value


def _metrics(total: Mapping[str, _Family]) -> Iterator[Metric]:
    for name, family in total.items():
        metric = Metric(name, family.documentation, family.kind)
        for (sample, labels), value in family.values.items():
            metric.add_sample(sample, dict(labels), value)
        yield metric
