"""What the system reports of a run, and the conditions that are counted from it.

A count says how often a condition occurred and how often at least it had to; it never looks at the tokens.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc.aio
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from staffetta.v1 import control_pb2, control_pb2_grpc
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.same_tokens.asking import Asked

MANY: Final = 16
"""Requests at a time, where there are many."""
DECODE: Final = "decode-0"
PREFILL: Final = "prefill-0"

_BLOCK_SIZE: Final = 16
_POLL_S: Final = 0.01
_LEAST_SHARE: Final = 0.1
"""Of the busiest thread's time, for a thread to count as computing."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What the system reported of a run."""

    requests: Sequence[Asked]
    answers: Sequence[Answer]
    num_steps: int
    """Steps of the decode worker's engine."""
    max_running: int
    """The most sequences that it was seen computing together."""
    num_recomputed: int
    """Tokens computed again after preemption."""
    num_threads: Mapping[str, int]
    """Threads that computed, by worker."""


Count = Callable[[Observed], tuple[int, int]]
"""How often a condition occurred, and how often at least it had to."""


# Counts


def alone(seen: Observed) -> tuple[int, int]:
    """Requests computed by the decode worker itself from the first token to the last, in one step per token."""
    num_whole = sum(a.handoff.locally_prefilled_tokens == a.prompt_tokens and not a.cached_tokens for a in seen.answers)
    is_one_step_each = seen.num_steps == sum(asked.max_tokens for asked in seen.requests)
    return num_whole * is_one_step_each, len(seen.requests)


def together(seen: Observed) -> tuple[int, int]:
    """Sequences computed together."""
    return seen.max_running, min(len(seen.requests), MANY) // 2


def overlapping(seen: Observed) -> tuple[int, int]:
    """Like `together` where prompts take so many steps that few sequences generate at the same time."""
    return seen.max_running, 2


def cuts(budget: int) -> Count:
    """Places where a prompt was cut, sent one at a time: steps beyond one for each token. All that the budget makes."""

    def count(seen: Observed) -> tuple[int, int]:
        num_parts = sum(-(-len(asked.token_ids) // budget) for asked in seen.requests)
        return seen.num_steps - sum(asked.max_tokens for asked in seen.requests), num_parts - len(seen.requests)

    return count


def preempted(seen: Observed) -> tuple[int, int]:
    """Tokens computed again."""
    return seen.num_recomputed, 1


def hits_on_decode(seen: Observed) -> tuple[int, int]:
    """Requests with cached tokens, less than the whole prompt."""
    num_hits = sum(0 < answer.cached_tokens < answer.prompt_tokens for answer in seen.answers)
    return num_hits, sum(asked.cut > _BLOCK_SIZE for asked in seen.requests)


def full_hits_on_decode(seen: Observed) -> tuple[int, int]:
    """Requests of which every block but that of the last token was cached."""
    most = [(len(asked.token_ids) - 1) // _BLOCK_SIZE * _BLOCK_SIZE for asked in seen.requests]
    num_full = sum(0 < answer.cached_tokens == full for answer, full in zip(seen.answers, most, strict=True))
    return num_full, sum(full > 0 for full in most)


def hits_on_prefill(seen: Observed) -> tuple[int, int]:
    """Requests handed over whole, of which the prefill worker had a beginning cached."""
    num_hits = sum(a.handoff.prefill_cached_tokens > 0 and not a.cached_tokens for a in seen.answers)
    return num_hits, sum(asked.cut > _BLOCK_SIZE for asked in seen.requests)


def hits_before_handoff(seen: Observed) -> tuple[int, int]:
    """Requests with cached tokens on the decode worker, whose other blocks were handed over."""
    num_both = sum(a.cached_tokens > 0 and a.handoff.handoff_blocks > 0 for a in seen.answers)
    return num_both, sum(_BLOCK_SIZE < asked.cut < len(asked.token_ids) - _BLOCK_SIZE for asked in seen.requests)


def handed_over(transport: str) -> Count:
    """Requests none of whose prompt was computed on the decode worker."""

    def count(seen: Observed) -> tuple[int, int]:
        handoffs = [answer.handoff for answer in seen.answers]
        num_over = sum(h.transport == transport and not h.locally_prefilled_tokens for h in handoffs)
        return num_over, len(seen.requests)

    return count


def on_two_threads(worker: str, count: Count) -> Count:
    """What `count` counts, provided that several threads of the worker computed."""

    def count_threaded(seen: Observed) -> tuple[int, int]:
        num_occurred, num_demanded = count(seen)
        return num_occurred * (seen.num_threads[worker] > 1), num_demanded

    return count_threaded


# What the system reports


class Watch:
    """Looks at the decode worker's load all the time that its block runs."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.max_running = 0

    async def __aenter__(self) -> "Watch":
        workers = await asyncio.to_thread(self._cluster.workers)
        self._task = asyncio.create_task(self._look(workers[DECODE].announcement.address))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _look(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            while True:
                load: control_pb2.GetLoadResponse = await stub.GetLoad(control_pb2.GetLoadRequest())
                self.max_running = max(self.max_running, load.num_running)
                await asyncio.sleep(_POLL_S)


class Totals(NamedTuple):
    """Since the start: steps of the decode worker, recomputed tokens, and every worker's time by thread."""

    num_steps: int
    num_recomputed: int
    busy_s: Mapping[str, Mapping[int, float]]


def settled(cluster: Cluster) -> Totals:
    """The totals once nothing runs."""
    loads = cluster.wait_until_idle()
    page = httpx.get(f"http://{cluster.http}/metrics").text
    num_recomputed = sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "staffetta_recomputed_tokens_total" and sample.labels["reason"] == "preemption"
    )
    busy_s = {name: _busy_s(process) for name, process in cluster.processes().items() if name in loads}
    return Totals(loads[DECODE].engine_steps, int(num_recomputed), busy_s)


def _busy_s(process: psutil.Process) -> dict[int, float]:
    """Seconds of every thread but the first, which is the event loop."""
    return {thread.id: thread.user_time for thread in process.threads() if thread.id != process.pid}


def num_computing(before: Mapping[int, float], after: Mapping[int, float]) -> int:
    """Threads with a fair share of the work: those of the transports and of gRPC only pass it on."""
    spent = [busy_s - before.get(thread, 0.0) for thread, busy_s in after.items()]
    return sum(busy_s > 0 and busy_s >= _LEAST_SHARE * max(spent) for busy_s in spent)
