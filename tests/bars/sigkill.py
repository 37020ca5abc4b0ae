"""Bar: a prefill worker's death costs time, never a token.

Prefill workers are killed by SIGKILL in every state of a hand-off, forced by failpoints, and at random moments from
outside, while requests keep coming. Every request must end without an error and with the tokens of an undisturbed run,
greedy and seeded alike. That the state was hit is read from the decode worker's own counts of failed hand-offs.
"""

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio
import psutil

from tests.bars.concurrent import run_all
from tests.bars.report import parse_size, print_table, spread, verdict
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import Prompt, token_prompts
from tests.e2e.reflected import ReflectedClient
from tests.loop import run

_MAX_TOKENS: Final = 12
_NUM_PROMPTS: Final = 24
_REQUEST_S: Final = 30.0
_MOST_S_PER_KILL: Final = 12.0
_PREFILL: Final = ("prefill-0", "prefill-1")


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to die. `counted` are the states of hand-offs by which the decode worker's counts show that it was hit.

    The first prompt of every system is serve's own self-test, so a failpoint must not fire before it is through.
    """

    state: str
    failpoint: str
    counted: frozenset[str]
    transport: str = "shm"
    num_at_once: int = 1
    """One request at a time where a failpoint kills: then every failed hand-off is the one that was hit."""


FAULTS: Final = (
    Fault("open", "prefill.accepted:kill:2", frozenset({"open"})),
    Fault("pulling", "prefill.chunk_sent:kill:8", frozenset({"pulling"})),
    Fault("pulling, in a read", "tcp.serving:kill:9", frozenset({"pulling"}), transport="tcp"),
    Fault("first token sent", "prefill.first_token_sent:kill:2", frozenset({"pulling"})),
    Fault("committed", "prefill.release_received:kill:2", frozenset({"committed"})),
    Fault("at random, from outside", "", frozenset(), num_at_once=4),
)


@dataclass(slots=True)
class Toll:
    """What the kills of one fault did."""

    fault: Fault
    num_kills: int = 0
    num_requests: int = 0
    num_other_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    """Hand-offs by the state in which they failed, or committed ones."""
    num_touched: int = 0
    """Requests that had a failed hand-off."""
    num_local: int = 0
    """Requests whose prompt was at least partly computed on the decode worker."""
    durations_s: list[float] = field(default_factory=list)

    @property
    def num_counted(self) -> int:
        """Hand-offs that ended in the state that this fault is meant for."""
        return sum(self.ended[state] for state in self.fault.counted)

    def has_enough(self, num_kills: int) -> bool:
        """Whether so many kills were seen, each in its state."""
        return self.num_kills >= num_kills and (not self.fault.counted or self.num_counted >= num_kills)


def flags(fault: Fault) -> tuple[str, ...]:
    """Two prefill workers, so that another can take over; small steps, so that a prompt is many chunks."""
    shape = ("--prefill", "2", "--decode", "1", "--threads", "1", "--max-batch-tokens", "64", "--no-prefix-caching")
    spoilt = ("--prefill-failpoints", fault.failpoint) if fault.failpoint else ()
    return (*shape, "--transports", fault.transport, *spoilt)


def fields_of(prompt: Prompt) -> dict[str, Any]:
    """A request for tokens after `prompt`: every second one greedy, the others drawn with the prompt's own seed."""
    temperature = 0.0 if prompt.seed % 2 else 1.0
    sampling = {"temperature": temperature, "seed": prompt.seed, "max_tokens": _MAX_TOKENS, "ignore_eos": True}
    return {"tokens": {"token_ids": prompt.token_ids}, "sampling": sampling}


def undisturbed(prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The tokens after every prompt when nothing goes wrong: one process, one request at a time."""

    async def generate_all(cluster: Cluster) -> list[Answer]:
        async with ReflectedClient(cluster.grpc) as client:
            return await run_all(prompts, lambda prompt: client.generate(**fields_of(prompt)), num_at_once=1)

    with Cluster("--prefill", "0", "--decode", "1", "--threads", "1", "--max-batch-tokens", "64") as cluster:
        return [answer.token_ids for answer in run(generate_all(cluster))]


async def endure(
    cluster: Cluster,
    fault: Fault,
    prompts: Sequence[Prompt],
    expected: Sequence[tuple[int, ...]],
    *,
    num_kills: int,
    seed: int,
) -> Toll:
    """Sends requests, some at once, without a pause, until `num_kills` kills have hit their state."""
    toll = Toll(fault)
    give_up_at = time.monotonic() + _MOST_S_PER_KILL * num_kills
    before = _ended(cluster)
    rng = random.Random(f"sigkill:{seed}")
    async with ReflectedClient(cluster.grpc) as client:

        async def keep_asking(worker: int) -> None:
            index = worker
            while not toll.has_enough(num_kills) and time.monotonic() < give_up_at:
                await _ask(client, toll, prompts[index % len(prompts)], expected[index % len(prompts)])
                index += fault.num_at_once

        async def keep_counting() -> None:
            while not toll.has_enough(num_kills) and time.monotonic() < give_up_at:
                await asyncio.sleep(0.05)
                if not fault.failpoint:
                    await asyncio.sleep(rng.uniform(0, 0.3))
                    _kill_one(cluster, rng)
                toll.num_kills = cluster.log.ends("SIGKILL").total()
                toll.ended = await asyncio.to_thread(_ended, cluster) - before

        async with asyncio.TaskGroup() as group:
            group.create_task(keep_counting())
            for worker in range(fault.num_at_once):
                group.create_task(keep_asking(worker))
    return toll


async def _ask(client: ReflectedClient, toll: Toll, prompt: Prompt, expected: tuple[int, ...]) -> None:
    started = time.monotonic()
    toll.num_requests += 1
    try:
        answer = await client.generate(timeout_s=_REQUEST_S, **fields_of(prompt))
    except grpc.aio.AioRpcError as error:
        toll.errors.append(f"{error.code().name}: {error.details()}")
        return
    except AssertionError as error:
        toll.errors.append(str(error))
        return
    toll.durations_s.append(time.monotonic() - started)
    toll.num_other_tokens += answer.token_ids != expected
    toll.num_touched += answer.handoff.failed_handoffs > 0
    toll.num_local += answer.handoff.locally_prefilled_tokens > 0


def _kill_one(cluster: Cluster, rng: random.Random) -> None:
    living = [name for name in _PREFILL if name in cluster.processes()]
    # It may be between two lives; the next moment will do.
    with contextlib.suppress(KeyError, psutil.NoSuchProcess):
        if living:
            cluster.signal(rng.choice(living), signal.SIGKILL)


def _ended(cluster: Cluster) -> Counter[str]:
    counts = cluster.load("decode-0").handoffs
    return Counter({count.state: count.count for count in counts if count.outcome in ("failed", "done")})


def measure(
    fault: Fault, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]], *, num_kills: int, seed: int
) -> Toll:
    """Endures one fault in a system of its own, which must be whole and idle in the end."""
    with Cluster(*flags(fault)) as cluster:
        print(cluster.command, flush=True)
        toll = run(endure(cluster, fault, prompts, expected, num_kills=num_kills, seed=seed))
        cluster.wait_until_linked()
        cluster.wait_until_idle()
    return toll


def failures(toll: Toll, *, num_kills: int) -> list[str]:
    """Why the bar is missed."""
    state = toll.fault.state
    found = [f"{state}: {error}" for error in sorted(set(toll.errors))]
    if toll.num_other_tokens:
        found.append(f"{state}: {toll.num_other_tokens} of {toll.num_requests} requests have other tokens")
    if not toll.has_enough(num_kills):
        found.append(f"{state}: {toll.num_kills} kills, {toll.num_counted} in their state, {num_kills} demanded")
    return found


def make_prompts(*, seed: int) -> list[Prompt]:
    """Prompts of several chunks."""
    return token_prompts(_NUM_PROMPTS, seed=seed, min_tokens=400, max_tokens=900)


def main(argv: Sequence[str]) -> int:
    """Runs the bar; `--count` is the number of kills for each of the six faults."""
    size = parse_size(__doc__, argv, short=2, full=17)
    prompts = make_prompts(seed=size.seed)
    expected = undisturbed(prompts)
    tolls = [measure(fault, prompts, expected, num_kills=size.count, seed=size.seed) for fault in FAULTS]
    print_table(
        f"{sum(toll.num_kills for toll in tolls)} kills, seed {size.seed}",
        (
            "state",
            "kills",
            "hand-offs by state",
            "requests",
            "touched",
            "local",
            "other tokens",
            "errors",
            "seconds each",
        ),
        [
            [
                toll.fault.state,
                toll.num_kills,
                ", ".join(f"{count} {state}" for state, count in sorted(toll.ended.items())) or "none",
                toll.num_requests,
                toll.num_touched,
                toll.num_local,
                toll.num_other_tokens,
                len(toll.errors),
                spread(toll.durations_s, digits=2),
            ]
            for toll in tolls
        ],
    )
    return verdict([failure for toll in tolls for failure in failures(toll, num_kills=size.count)])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
