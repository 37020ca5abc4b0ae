"""What /metrics says. Names that dashboards and autoscalers already read, and our own for the hand-off.

Gauges are read, at every scrape, from the set they describe; nothing is counted up and down. Nothing here raises into a
request.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gateway.workers import Workers
from staffetta.v1 import decode_pb2

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
BLOCK_STATES: Final = ("free", "cached", "held", "quarantined")
HANDOFF_STAGES: Final = ("queue", "prefill", "transfer")
"""In the order in which they happen; `transfer` is what was left of it after the first token."""
_BYTES: Final = tuple(4.0**power * 1024 for power in range(11))


class InFlight(NamedTuple):
    """Requests in the gateway now: those that have produced a token, and those that have not."""

    num_running: int
    num_waiting: int


class Metrics:
    """One gateway's metrics. Event loop only."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        # When a series began is noise to whoever reads the page. The library has one switch for the process.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.time_to_first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_S
        )
        self.inter_token_latency = self._histogram(
            "vllm:inter_token_latency_seconds", "Gaps between tokens of one request.", _GAP_S
        )
        self._latency = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _LATENCY_S)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens.", "model_name").labels(model_name)
        self._generated_tokens = self._counter("vllm:generation_tokens", "Generated tokens.", "model_name").labels(
            model_name
        )
        self._ended = self._counter("vllm:request_success", "Ended requests, by how.", "model_name", "finished_reason")
        self._recomputed_tokens = self._counter("staffetta_recomputed_tokens", "Tokens computed again.", "reason")
        self._handoff_bytes = Histogram(
            "staffetta_handoff_bytes",
            "KV bytes pulled for a request.",
            ("transport",),
            buckets=_BYTES,
            registry=self._registry,
        )
        self._handoff_s = Histogram(
            "staffetta_handoff_seconds",
            "Requests whose KV was pulled: until computing began, to the first token, to the last block.",
            ("stage",),
            buckets=_LATENCY_S,
            registry=self._registry,
        )

    def watch(self, in_flight: Callable[[], InFlight], workers: Workers) -> None:
        """Adds the gauges, read from what is in flight and from the registered workers."""
        self._registry.register(_Gauges(self._model_name, in_flight, workers))

    def ended(self, reason: str, *, latency_s: float, num_prompt_tokens: int, num_tokens: int) -> None:
        """Counts one request that ended by `reason`: "stop", "length", "abort" or "error"."""
        self._ended.labels(self._model_name, reason).inc()
        self._latency.observe(latency_s)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generated_tokens.inc(num_tokens)

    def handed_over(self, summary: decode_pb2.SequenceSummary) -> None:
        """Counts how the KV of a request's prompt travelled, and what a failed hand-off made it compute twice."""
        handoff = summary.handoff
        if handoff.transport:
            self._handoff_bytes.labels(handoff.transport).observe(handoff.handoff_bytes)
            for stage in HANDOFF_STAGES:
                self._handoff_s.labels(stage).observe(getattr(summary.timings, f"{stage}_s"))
        if handoff.failed_handoffs:
            self._recomputed_tokens.labels("handoff_failed").inc(handoff.locally_prefilled_tokens)

    def recomputed(self, summary: decode_pb2.SequenceSummary) -> None:
        """Counts what a choice computed twice because it was preempted."""
        self._recomputed_tokens.labels("preemption").inc(summary.recomputed_tokens)

    def render(self) -> bytes:
        """The page for a scraper."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> "Distribution":
        found = Distribution(name, text, buckets, model_name=self._model_name)
        self._registry.register(found)
        return found

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)


class Distribution(Collector):
    """A histogram of one series for the event loop alone: without the library's locks, which cost more than the rest
    of what is done for a token."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], *, model_name: str) -> None:
        """`bounds` are the buckets' upper ones, ascending, each part of its bucket; the last bucket has none."""
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._model_name = model_name
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, *, count: int = 1) -> None:
        """Counts `value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def describe(self) -> Iterable[Metric]:
        """Nothing, as the gauges."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The one family."""
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name",))
        bounds = (*map(floatToGoString, self._bounds), "+Inf")
        family.add_metric((self._model_name,), list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class _Gauges(Collector):
    def __init__(self, model_name: str, in_flight: Callable[[], InFlight], workers: Workers) -> None:
        self._model_name = model_name
        self._in_flight = in_flight
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are told at the first scrape, so that registering reads no set."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Reads every gauge."""
        now = self._in_flight()
        yield self._gauge("vllm:num_requests_running", "Requests that have produced a token.", now.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that have not.", now.num_waiting)
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 is all.", labels=("model_name", "worker")
        )
        blocks = GaugeMetricFamily("staffetta_kv_blocks", "KV blocks of a worker.", labels=("worker", "state"))
        stalled = GaugeMetricFamily("staffetta_engine_stalled", "1 while an engine stands still.", labels=("worker",))
        sessions = GaugeMetricFamily("staffetta_sessions", "1 while a session is open.", labels=("worker",))
        for worker in self._workers:
            for state in BLOCK_STATES:
                blocks.add_metric((worker.worker_id, state), getattr(worker.load, f"{state}_blocks"))
            num_blocks = worker.announcement.num_blocks
            num_used = num_blocks - worker.load.num_available_blocks
            usage.add_metric((self._model_name, worker.worker_id), num_used / num_blocks if num_blocks else 0.0)
            if worker.is_decode:
                session = worker.session
                sessions.add_metric((worker.worker_id,), session is not None)
                stalled.add_metric((worker.worker_id,), session is not None and session.is_stalled)
        yield from (usage, blocks, sessions, stalled)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family
