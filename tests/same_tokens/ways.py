"""The ways in which a system can run the same requests, and for each the counts that prove it was really taken.

A way never decides whether its tokens are right; it brings them, with how often its conditions occurred.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.bars.concurrent import run_all
from tests.e2e.cluster import Cluster
from tests.e2e.reflected import Choices, ReflectedClient
from tests.same_tokens import observed
from tests.same_tokens.asking import Asked, Streams, ask, ask_after_its_beginning, ask_again, ask_for_tokens
from tests.same_tokens.bits import AnswerBits, bits_of, tokens_of, without_logprobs
from tests.same_tokens.observed import DECODE, Condition, Count, Observed
from tests.same_tokens.sessions import Start, restarts, start_all

MANY: Final = 16
"""Requests at a time, where there are many."""

Ask = Callable[[ReflectedClient, Asked], Awaitable[Choices]]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a way is taken. `expected` is empty while the reference itself is made."""

    cluster: Cluster
    requests: Sequence[Asked]
    expected: Sequence[AnswerBits]


@dataclass(frozen=True, slots=True)
class Taken:
    """What was sent, in order, what came back beside what was due, and the conditions.

    Of a restarted request, what is due is the rest of one of its choices.
    """

    sent: Sequence[object]
    outputs: Sequence[AnswerBits]
    expected: Sequence[AnswerBits]
    conditions: Sequence[Condition]


@dataclass(frozen=True, slots=True)
class Way:
    """One way: its name, and what takes it."""

    name: str
    take: Callable[[Site], Coroutine[Any, Any, Taken]]


# Ways


def sending(name: str, *counts: Count, num_at_once: int = 1, each: Ask = ask) -> Way:
    """The way of clients: every request sent through the gateway, so many at once."""

    async def take(site: Site) -> Taken:
        answers, seen = await _send(site.cluster, site.requests, each, num_at_once=num_at_once)
        outputs = [bits_of(answer) for answer in answers]
        return Taken(site.requests, outputs, site.expected or outputs, [count(seen) for count in counts])

    return Way(name, take)


def for_tokens(streams: Streams, *counts: Count) -> Way:
    """The way of clients that ask for no log-probabilities, so that steps are begun ahead where there are threads."""

    async def take(site: Site) -> Taken:
        pairs = [pair for pair in zip(site.requests, site.expected, strict=True) if streams.are(pair[0])]
        requests = [asked for asked, _ in pairs]
        answers, seen = await _send(site.cluster, requests, ask_for_tokens, num_at_once=streams.num_at_once)
        expected = [without_logprobs(due) for _, due in pairs]
        return Taken(requests, list(map(tokens_of, answers)), expected, [count(seen) for count in counts])

    return Way(str(streams), take)


async def _send(
    cluster: Cluster, requests: Sequence[Asked], each: Ask, *, num_at_once: int
) -> tuple[list[Choices], Observed]:
    before = await asyncio.to_thread(observed.settled, cluster)
    async with ReflectedClient(cluster.grpc) as client:

        async def send(asked: Asked) -> Choices:
            return await each(client, asked)

        answers = await run_all(requests, send, num_at_once=num_at_once)
    after = await asyncio.to_thread(observed.settled, cluster)
    seen_by_clients = list(map(observed.seen_by_client, requests, answers))
    return answers, await asyncio.to_thread(observed.observe, cluster, seen_by_clients, before=before, after=after)


def _on_session(
    name: str,
    *counts: Count,
    pairs_of: Callable[[Sequence[Asked], Sequence[AnswerBits]], Sequence[tuple[Start, AnswerBits]]],
) -> Way:
    """The way of gateways: requests, or what is left of them, on the decode worker's session."""

    async def take(site: Site) -> Taken:
        pairs = pairs_of(site.requests, site.expected)
        starts = [start for start, _ in pairs]
        before = await asyncio.to_thread(observed.settled, site.cluster)
        worker = (await asyncio.to_thread(site.cluster.workers))[DECODE].announcement
        told = await start_all(worker, starts, num_at_once=MANY)
        after = await asyncio.to_thread(observed.settled, site.cluster)
        requests = [
            observed.seen_on_session(
                start.asked,
                num_prompt_tokens=len(start.asked.token_ids) + len(start.head),
                lengths=[len(choice.tokens) for choice in each.bits.choices],
                summaries=each.summaries,
            )
            for start, each in zip(starts, told, strict=True)
        ]
        seen = await asyncio.to_thread(observed.observe, site.cluster, requests, before=before, after=after)
        outputs = [each.bits for each in told]
        return Taken(starts, outputs, [due for _, due in pairs], [count(seen) for count in counts])

    return Way(name, take)


def _thrice(requests: Sequence[Asked], answers: Sequence[AnswerBits]) -> list[tuple[Start, AnswerBits]]:
    """Every request and its answer three times over, so that also a few requests are too many for the pool."""
    return 3 * list(zip(map(Start, requests), answers, strict=True))


REFERENCE: Final = sending("alone", observed.alone, observed.copies)
PREEMPTED: Final = _on_session(
    f"preempted, {MANY} at a time",
    observed.recomputed,
    observed.preempted_forks,
    observed.some_copies,
    pairs_of=_thrice,
)
PARTIAL_HIT: Final = sending(
    "partial prefix hit on decode",
    observed.hits_on_decode,
    observed.scored_without_hits,
    observed.copies,
    num_at_once=4,
    each=ask_after_its_beginning,
)
FULL_HIT: Final = sending(
    "full prefix hit on decode",
    observed.full_hits_on_decode,
    observed.scored_without_hits,
    observed.copies,
    num_at_once=4,
    each=ask_again,
)
PREFILL_HIT: Final = sending(
    "prefix hit on prefill",
    observed.hits_on_prefill,
    observed.scored_without_hits,
    observed.handed_over_bytes,
    num_at_once=4,
    each=ask_after_its_beginning,
)
HIT_AND_HANDOFF: Final = sending(
    "prefix hit on decode, rest handed over",
    observed.hits_before_handoff,
    observed.scored_without_hits,
    observed.handed_over_bytes,
    num_at_once=4,
    each=ask_after_its_beginning,
)


def batched(budget: int, *others: Count) -> Way:
    """Many at a time, with prompts cut by `budget` tokens where they are longer."""
    counts = (observed.shared_steps(budget), observed.copies, *others)
    return sending(f"{MANY} at a time, chunks of {budget}", *counts, num_at_once=MANY)


def cut_by(budget: int) -> Way:
    """Prompts in parts, one request at a time."""
    return sending(f"alone, chunks of {budget}", observed.cuts(budget), observed.copies)


def handing_over(transport: str, *others: Count) -> Way:
    """Prompts computed elsewhere."""
    counts = (observed.handed_over(transport), observed.handed_over_bytes, observed.copies, *others)
    return sending(f"handed over, {MANY} at a time", *counts, num_at_once=MANY)


def restarting(*counts: Count) -> Way:
    """The way of a gateway that lost a worker: every choice of every request goes on after some of its tokens."""
    return _on_session("restarted", _restarted, *counts, pairs_of=restarts)


def _restarted(seen: Observed) -> Condition:
    return Condition("choices restarted", len(seen.requests), 1)
