"""The ways in which a system can run the same requests, and for each the count that proves it was really taken.

A way never decides whether its tokens are right; it brings them, with how often its condition occurred.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.bars.concurrent import run_all
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import MAX_PROMPT_TOKENS
from tests.e2e.reflected import ReflectedClient
from tests.same_tokens import observed
from tests.same_tokens.asking import (
    SHORT_PROMPT_TOKENS,
    Asked,
    TokenBits,
    ask,
    ask_after_its_beginning,
    ask_again,
    bits_of,
)
from tests.same_tokens.observed import DECODE, MANY, PREFILL, Count, Observed
from tests.same_tokens.restart import restart_all

Ask = Callable[[ReflectedClient, Asked], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a way is taken. `expected` is empty while the reference itself is made."""

    cluster: Cluster
    requests: Sequence[Asked]
    expected: Sequence[Sequence[TokenBits]]


@dataclass(frozen=True, slots=True)
class Taken:
    """The output of every request in order, and how often the condition occurred, of how often at least it had to."""

    outputs: Sequence[Sequence[TokenBits]]
    num_occurred: int
    num_demanded: int


@dataclass(frozen=True, slots=True)
class Way:
    """One way: its name, its condition in words, and what takes it."""

    name: str
    condition: str
    take: Callable[[Site], Coroutine[Any, Any, Taken]]
    max_prompt_tokens: int = MAX_PROMPT_TOKENS
    """Requests with longer prompts are left out: a small pool has no room for them."""
    num_copies: int = 1
    """How often every request is sent, for a condition that only several requests bring about."""


# Ways


def sending(
    name: str,
    condition: str,
    count: Count,
    *,
    num_at_once: int = 1,
    each: Ask = ask,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    num_copies: int = 1,
) -> Way:
    """The way of clients: every request sent through the gateway, so many at once."""

    async def take(site: Site) -> Taken:
        before = await asyncio.to_thread(observed.settled, site.cluster)
        async with ReflectedClient(site.cluster.grpc) as client, observed.Watch(site.cluster) as watch:

            async def send(asked: Asked) -> Answer:
                return await each(client, asked)

            answers = await run_all(site.requests, send, num_at_once=num_at_once)
        after = await asyncio.to_thread(observed.settled, site.cluster)
        seen = Observed(
            requests=site.requests,
            answers=answers,
            num_steps=after.num_steps - before.num_steps,
            max_running=watch.max_running,
            num_recomputed=after.num_recomputed - before.num_recomputed,
            num_threads={
                name: observed.num_computing(before.busy_s[name], busy_s) for name, busy_s in after.busy_s.items()
            },
        )
        return Taken([bits_of(answer) for answer in answers], *count(seen))

    return Way(name, condition, take, max_prompt_tokens, num_copies)


def restarting(name: str, *, num_at_once: int, transport: str = "") -> Way:
    """The way of a gateway that lost a worker: every request goes on after some of its tokens.

    With a transport, the KV of prompt and tokens has to come over it; not where the first new token is the last one.
    """

    async def take(site: Site) -> Taken:
        worker = (await asyncio.to_thread(site.cluster.workers))[DECODE].announcement
        rests = await restart_all(worker, site.requests, site.expected, num_at_once=num_at_once)
        num_restarted = sum(rest.summary.handoff.transport == transport for rest in rests)
        num_demanded = sum(not transport or len(rest.tokens) > 1 for rest in rests)
        return Taken([rest.tokens for rest in rests], num_restarted, num_demanded)

    return Way(name, "requests restarted", take)


REFERENCE: Final = sending("alone, one step per prompt", "requests in one step per token", observed.alone)
BATCHED: Final = sending(f"{MANY} at a time", "sequences in one step", observed.together, num_at_once=MANY)
MIXED: Final = sending(f"{MANY} at a time, cut", "sequences in one step", observed.overlapping, num_at_once=MANY)
PREEMPTED: Final = sending(
    "preempted",
    "tokens computed again",
    observed.preempted,
    num_at_once=MANY,
    max_prompt_tokens=SHORT_PROMPT_TOKENS,
    num_copies=4,
)
PARTIAL_HIT: Final = sending(
    "partial prefix hit on decode", "requests", observed.hits_on_decode, num_at_once=4, each=ask_after_its_beginning
)
FULL_HIT: Final = sending(
    "full prefix hit on decode", "requests", observed.full_hits_on_decode, num_at_once=4, each=ask_again
)
PREFILL_HIT: Final = sending(
    "prefix hit on prefill", "requests", observed.hits_on_prefill, num_at_once=4, each=ask_after_its_beginning
)
HIT_AND_HANDOFF: Final = sending(
    "prefix hit on decode, rest handed over",
    "requests",
    observed.hits_before_handoff,
    num_at_once=4,
    each=ask_after_its_beginning,
)


def cut_by(budget: int) -> Way:
    """Prompts in parts."""
    return sending(f"chunks of {budget}", "cuts", observed.cuts(budget))


THREADED: Final = sending(
    f"{MANY} at a time on 2 threads",
    "sequences in one step",
    observed.on_two_threads(DECODE, observed.together),
    num_at_once=MANY,
)


def handing_over_threaded(*, prefill: int, decode: int) -> Way:
    """Prompts computed elsewhere, each side on its own number of threads.

    That two threads compute is demanded of prefill alone: most steps of decode are too small to be shared out.
    """
    over = observed.handed_over("shm")
    count = observed.on_two_threads(PREFILL, over) if prefill == 2 else over
    return sending(f"prefill on {prefill}, decode on {decode} threads", "hand-offs", count, num_at_once=MANY)


def handing_over(transport: str, *, num_at_once: int, max_prompt_tokens: int = MAX_PROMPT_TOKENS) -> Way:
    """Prompts computed elsewhere."""
    name = f"hand-off over {transport}, {num_at_once} at a time"
    count = observed.handed_over(transport)
    return sending(name, "hand-offs", count, num_at_once=num_at_once, max_prompt_tokens=max_prompt_tokens)
