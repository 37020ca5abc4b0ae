"""What the system reports of a run, and the conditions that are counted from it.

A count says how often a condition occurred and how often at least it had to; it never looks at the tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from staffetta.v1 import decode_pb2
from tests.e2e.answers import Handoff
from tests.e2e.cluster import Cluster, block_bytes
from tests.e2e.reflected import Choices
from tests.same_tokens.asking import Asked

DECODE: Final = "decode-0"
PREFILL: Final = "prefill-0"

_LEAST_SHARE: Final = 0.1
"""Of the busiest thread's time, for a thread to count as computing."""

_KERNELS: Final = "kernels"
"""The name of their threads."""


class Seen(NamedTuple):
    """One request as it ran: the tokens of each choice, and what the system said of the longest one's."""

    asked: Asked
    num_prompt_tokens: int
    lengths: tuple[int, ...]
    num_cached: int
    handoff: Handoff
    num_preemptions: tuple[int, ...] = ()
    """Of each choice; only a worker's session tells."""
    num_recomputed: int = 0
    """Tokens computed again because of that, by all choices."""

    @property
    def num_steps(self) -> int:
        """Steps that the request takes alone when its prompt takes one."""
        return max(self.lengths)

    @property
    def num_going_on(self) -> int:
        """Choices that did not end with their first token: so many sequences came of the prompt's one."""
        return sum(length > 1 for length in self.lengths)


@dataclass(frozen=True, slots=True)
class Observed:
    """What the system reported of a run."""

    requests: Sequence[Seen]
    num_steps: int
    """Steps of the decode worker's engine."""
    num_copies: int
    """Blocks that the decode worker copied."""
    num_threads: Mapping[str, int]
    """Threads that computed, by worker."""
    beside_us: Mapping[str, Sequence[int]]
    """Microseconds of every thread that the kernels started and that computed, by worker, the busiest one first."""
    block_size: int
    block_bytes: int


class Condition(NamedTuple):
    """What was to happen, in words, how often it did, and how often at least it had to."""

    words: str
    num_occurred: int
    num_demanded: int

    @property
    def is_met(self) -> bool:
        """Whether it occurred as often as demanded, and at all."""
        return self.num_occurred >= max(1, self.num_demanded)

    def __str__(self) -> str:
        return f"{self.num_occurred} {self.words}"


Count = Callable[[Observed], Condition]


# Counts


def alone(seen: Observed) -> Condition:
    """Requests computed by the decode worker itself from the first token to the last, in one step per token."""
    is_whole = [r.handoff.locally_prefilled_tokens == r.num_prompt_tokens and not r.num_cached for r in seen.requests]
    is_one_step_each = seen.num_steps == sum(request.num_steps for request in seen.requests)
    return Condition("alone, in one step per token", sum(is_whole) * is_one_step_each, len(seen.requests))


def shared_steps(budget: int) -> Count:
    """Steps fewer than the requests take alone, with prompts cut by `budget`: at least a fortieth of them."""

    def count(seen: Observed) -> Condition:
        num_alone = sum(request.num_steps + _num_parts(request, budget) - 1 for request in seen.requests)
        return Condition("steps saved by sharing", num_alone - seen.num_steps, num_alone // 40)

    return count


def cuts(budget: int) -> Count:
    """Places where a prompt was cut, sent one at a time: steps beyond one for each token. All that the budget makes."""

    def count(seen: Observed) -> Condition:
        num_parts = sum(_num_parts(request, budget) for request in seen.requests)
        num_extra = seen.num_steps - sum(request.num_steps for request in seen.requests)
        return Condition("cuts", num_extra, num_parts - len(seen.requests))

    return count


def copies(seen: Observed) -> Condition:
    """Blocks copied on write: one less than choices that go on, for every prompt whose last block is not full."""
    num_wanted = sum(
        max(0, request.num_going_on - 1) for request in seen.requests if request.num_prompt_tokens % seen.block_size
    )
    return Condition("blocks copied", seen.num_copies, num_wanted)


def some_copies(seen: Observed) -> Condition:
    """Blocks copied on write where preemption may leave nothing to share."""
    return Condition("blocks copied", seen.num_copies, 1)


def recomputed(seen: Observed) -> Condition:
    """Tokens computed again."""
    return Condition("tokens recomputed", sum(request.num_recomputed for request in seen.requests), 1)


def preempted_forks(seen: Observed) -> Condition:
    """Choices preempted more often than another one of their request: after they had gone apart."""
    num_forks = sum(
        sum(times > min(request.num_preemptions) for times in request.num_preemptions) for request in seen.requests
    )
    return Condition("forks preempted", num_forks, 1)


def hits_on_decode(seen: Observed) -> Condition:
    """Requests with cached tokens, less than the whole prompt; none of those whose prompt is scored."""
    is_hit = [
        0 < request.num_cached < request.num_prompt_tokens and not request.asked.is_scored for request in seen.requests
    ]
    return Condition("partial hits", sum(is_hit), sum(_can_hit(request, seen.block_size) for request in seen.requests))


def full_hits_on_decode(seen: Observed) -> Condition:
    """Requests of which every block but that of the last token was cached; none of those whose prompt is scored."""
    most = [
        0 if request.asked.is_scored else (request.num_prompt_tokens - 1) // seen.block_size * seen.block_size
        for request in seen.requests
    ]
    num_full = sum(0 < request.num_cached == full for request, full in zip(seen.requests, most, strict=True))
    return Condition("full hits", num_full, sum(full > 0 for full in most))


def scored_without_hits(seen: Observed) -> Condition:
    """Requests whose prompt is scored and which took nothing from a cache, although it held their beginning."""
    scored = [r for r in seen.requests if r.asked.is_scored and r.asked.cut > seen.block_size]
    num_unhit = sum(not request.num_cached and not request.handoff.prefill_cached_tokens for request in scored)
    return Condition("scored without a hit", num_unhit, len(scored))


def hits_on_prefill(seen: Observed) -> Condition:
    """Requests handed over whole, of which the prefill worker had a beginning cached."""
    num_hits = sum(request.handoff.prefill_cached_tokens > 0 and not request.num_cached for request in seen.requests)
    return Condition("hits on prefill", num_hits, sum(_can_hit(request, seen.block_size) for request in seen.requests))


def hits_before_handoff(seen: Observed) -> Condition:
    """Requests with cached tokens on the decode worker, whose other blocks were handed over."""
    num_both = sum(request.num_cached > 0 and request.handoff.handoff_blocks > 0 for request in seen.requests)
    num_wanted = sum(
        _can_hit(request, seen.block_size)
        and request.asked.cut < request.num_prompt_tokens - seen.block_size
        and request.num_going_on > 0
        for request in seen.requests
    )
    return Condition("hits with a hand-off", num_both, num_wanted)


def handed_over(transport: str) -> Count:
    """Requests none of whose prompt was computed on the decode worker; one that ends at once may come without KV."""

    def count(seen: Observed) -> Condition:
        num_over = sum(
            request.handoff.transport == transport and not request.handoff.locally_prefilled_tokens
            for request in seen.requests
        )
        return Condition(f"over {transport}", num_over, sum(request.num_going_on > 0 for request in seen.requests))

    return count


def handed_over_bytes(seen: Observed) -> Condition:
    """Bytes of KV that were handed over, at least those of the tokens that were not cached."""
    num_bytes = sum(request.handoff.handoff_bytes for request in seen.requests)
    num_tokens = sum(
        request.num_prompt_tokens - request.num_cached for request in seen.requests if request.num_going_on
    )
    return Condition("bytes", num_bytes, num_tokens * seen.block_bytes // seen.block_size)


def on_two_threads(worker: str) -> Count:
    """Threads of the worker that computed."""

    def count(seen: Observed) -> Condition:
        return Condition(f"threads of {worker}", seen.num_threads[worker], 2)

    return count


def beside_the_engine(worker: str) -> Count:
    """Microseconds of a second thread of the kernels. On two threads a step has one beside the engine's own.

    The second one begins steps ahead, and only those; it sleeps where there are none.
    """

    def count(seen: Observed) -> Condition:
        _, second, *_ = *seen.beside_us[worker], 0, 0
        return Condition(f"µs beside the engine of {worker}", second, 1)

    return count


def _num_parts(request: Seen, budget: int) -> int:
    return -(-request.num_prompt_tokens // budget)


def _can_hit(request: Seen, block_size: int) -> bool:
    """Whether a beginning of at least a block was computed before, and may be used."""
    return request.asked.cut > block_size and not request.asked.is_scored


# What the system reports


class Totals(NamedTuple):
    """Since the start: the decode worker's steps and copies, and every worker's time by thread."""

    num_steps: int
    num_copies: int
    busy_s: Mapping[str, Mapping[int, float]]
    beside_ns: Mapping[str, Mapping[int, int]]
    """The same for threads that the kernels started alone, and exact."""


def settled(cluster: Cluster) -> Totals:
    """The totals once nothing runs."""
    loads = cluster.wait_until_idle()
    workers = {name: process for name, process in cluster.processes().items() if name in loads}
    return Totals(
        num_steps=loads[DECODE].engine_steps,
        num_copies=loads[DECODE].copied_blocks,
        busy_s={name: _busy_s(process) for name, process in workers.items()},
        beside_ns={name: _beside_ns(process) for name, process in workers.items()},
    )


def observe(cluster: Cluster, requests: Sequence[Seen], *, before: Totals, after: Totals) -> Observed:
    """What happened between two totals."""
    layout = cluster.workers()[DECODE].announcement.identity.layout
    return Observed(
        requests=requests,
        num_steps=after.num_steps - before.num_steps,
        num_copies=after.num_copies - before.num_copies,
        num_threads={name: _num_computing(before.busy_s[name], busy_s) for name, busy_s in after.busy_s.items()},
        beside_us={name: _beside_us(before.beside_ns[name], spent) for name, spent in after.beside_ns.items()},
        block_size=layout.groups[0].block_size,
        block_bytes=block_bytes(layout),
    )


def seen_by_client(asked: Asked, choices: Choices) -> Seen:
    """One request as its client saw it."""
    longest = max(choices.answers, key=lambda answer: len(answer.token_ids))
    lengths = tuple(len(answer.token_ids) for answer in choices.answers)
    return Seen(asked, longest.prompt_tokens, lengths, longest.cached_tokens, longest.handoff)


def seen_on_session(
    asked: Asked, *, num_prompt_tokens: int, lengths: Sequence[int], summaries: Sequence[decode_pb2.SequenceSummary]
) -> Seen:
    """One request as its worker summarised it."""
    longest = summaries[max(range(len(lengths)), key=lengths.__getitem__)]
    return Seen(
        asked,
        num_prompt_tokens,
        tuple(lengths),
        longest.cached_tokens,
        Handoff.from_message(longest.handoff),
        tuple(summary.num_preemptions for summary in summaries),
        sum(summary.recomputed_tokens for summary in summaries),
    )


def _busy_s(process: psutil.Process) -> dict[int, float]:
    """Seconds of every thread but the first, which is the event loop."""
    return {thread.id: thread.user_time for thread in process.threads() if thread.id != process.pid}


def _beside_ns(process: psutil.Process) -> dict[int, int]:
    """Nanoseconds of every thread that the kernels started."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return {
        int(thread.name): int((thread / "schedstat").read_text().split()[0])
        for thread in threads
        if (thread / "comm").read_text().strip() == _KERNELS
    }


def _beside_us(before: Mapping[int, int], after: Mapping[int, int]) -> list[int]:
    spent = [spent_ns - before.get(thread, 0) for thread, spent_ns in after.items()]
    return sorted((ns // 1000 for ns in spent if ns), reverse=True)


def _num_computing(before: Mapping[int, float], after: Mapping[int, float]) -> int:
    """Threads with a fair share of the work: those of the transports and of gRPC only pass it on."""
    spent = [busy_s - before.get(thread, 0.0) for thread, busy_s in after.items()]
    return sum(busy_s > 0 and busy_s >= _LEAST_SHARE * max(spent) for busy_s in spent)
