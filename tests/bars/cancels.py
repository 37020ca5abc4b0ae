"""Bar: a client that leaves, leaves nothing behind.

Requests are given up at random moments (before the first response, during prefill, between tokens, after the last one)
by cancelling the gRPC call or by dropping the REST connection, 16 to 32 at a time, over one prefill and one decode
worker with small pools. Afterwards every block on both workers is free or cached, nothing runs, waits or is held, and
tasks, threads and descriptors of every process are what they were after warming up.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

import grpc
import grpc.aio
import httpx

from tests.bars.concurrent import run_all
from tests.bars.report import parse_size, print_table, verdict
from tests.e2e.cluster import Cluster, Load, is_idle
from tests.e2e.prompts import Prompt, token_prompts
from tests.e2e.reflected import ReflectedClient, greedy
from tests.e2e.waiting import wait_until
from tests.loop import run

FLAGS: Final = ("--prefill", "1", "--decode", "1", "--num-blocks", "512", "--max-batch-tokens", "128")

_WARM_UP: Final = 1000
_NUM_ROUNDS: Final = 10
_NUM_PROMPTS: Final = 120
_MAX_TOKENS: Final = 12
_LONGEST_DELAY_S: Final = 0.12
_LONGEST_STREAM_S: Final = 0.6
_REST_SHARE: Final = 0.2
_EXPECTED: Final = frozenset({grpc.StatusCode.CANCELLED})

Abandon = Callable[[Prompt, random.Random], Coroutine[Any, Any, str]]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one process holds beside blocks."""

    num_tasks: int
    """0 for the gateway, which does not say."""
    num_threads: int
    num_descriptors: int


class Leaver:
    """A client that gives its requests up. Every method returns the name of the phase it gave up in."""

    def __init__(self, client: ReflectedClient, rest: httpx.AsyncClient) -> None:
        self._client = client
        self._rest = rest

    async def at_once(self, prompt: Prompt, _: random.Random) -> str:
        """Cancels before anything was received."""
        self._call(prompt).cancel()
        return "gRPC, at once"

    async def after_a_while(self, prompt: Prompt, rng: random.Random) -> str:
        """Cancels at any moment, mostly while the prompt is queued or computed."""
        call = self._call(prompt)
        reading = asyncio.create_task(_read(call, most=10**6))
        await asyncio.wait({reading}, timeout=rng.uniform(0, _LONGEST_DELAY_S))
        call.cancel()
        await reading
        return "gRPC, after a while"

    async def between_tokens(self, prompt: Prompt, rng: random.Random) -> str:
        """Cancels after some of the tokens."""
        call = self._call(prompt)
        await _read(call, most=rng.randint(2, _MAX_TOKENS))
        call.cancel()
        return "gRPC, between tokens"

    async def at_the_end(self, prompt: Prompt, _: random.Random) -> str:
        """Cancels when the last response was received and the status was not."""
        call = self._call(prompt)
        async for response in call:
            if response.WhichOneof("event") == "finished":
                break
        call.cancel()
        return "gRPC, at the end"

    async def disconnect(self, prompt: Prompt, rng: random.Random) -> str:
        """Drops a REST connection before its answer or in the middle of its stream."""
        body = {
            "model": "demo",
            "prompt": prompt.token_ids,
            "max_tokens": _MAX_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": rng.random() < 0.7,
        }
        num_lines = rng.randint(0, 2 * _MAX_TOKENS)
        try:
            async with asyncio.timeout(rng.uniform(0.001, _LONGEST_STREAM_S)):
                async with self._rest.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200, await response.aread()
                    async for _ in response.aiter_lines():
                        if (num_lines := num_lines - 1) < 0:
                            break
        except TimeoutError:
            return "REST, disconnected while waiting"
        return "REST, disconnected in the stream"

    def _call(self, prompt: Prompt) -> Any:
        return self._client.call("Generate", tokens={"token_ids": prompt.token_ids}, sampling=greedy(_MAX_TOKENS))


async def _read(call: Any, *, most: int) -> None:
    """Reads up to `most` responses. Raises when the call failed in any way but by its own cancel."""
    try:
        async for _ in call:
            most -= 1
            if most == 0:
                return
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
    except grpc.aio.AioRpcError as error:
        if error.code() not in _EXPECTED:
            raise


async def abandon_all(cluster: Cluster, prompts: Sequence[Prompt], *, count: int, seed: int) -> Counter[str]:
    """Gives `count` requests up, and returns how many in which phase."""
    rng = random.Random(f"cancels:{seed}")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        ReflectedClient(cluster.grpc) as client,
        httpx.AsyncClient(base_url=f"http://{cluster.http}", limits=limits, timeout=30.0) as rest,
    ):
        leaver = Leaver(client, rest)
        over_grpc: Sequence[Abandon] = (
            leaver.at_once,
            leaver.after_a_while,
            leaver.after_a_while,
            leaver.between_tokens,
            leaver.at_the_end,
        )

        async def abandon(seed: int) -> str:
            own = random.Random(seed)
            way: Abandon = leaver.disconnect if own.random() < _REST_SHARE else own.choice(over_grpc)
            return await way(own.choice(prompts), own)

        seeds = [rng.getrandbits(64) for _ in range(count)]
        return Counter(await run_all(seeds, abandon, num_at_once=rng.randint(16, 32)))


def footprints(cluster: Cluster) -> dict[str, Footprint]:
    """Of every worker, as it says, and of the gateway, as the kernel says."""
    found = {
        name: Footprint(load.num_tasks, load.num_threads, load.num_descriptors)
        for name, load in cluster.loads().items()
    }
    gateway = cluster.processes()["gateway"]
    return found | {"gateway": Footprint(0, gateway.num_threads(), gateway.num_fds())}


def excess(before: dict[str, Footprint], now: dict[str, Footprint], *, spare_threads: int = 0) -> list[str]:
    """What any process holds more of than before; of threads, `spare_threads` more are no excess."""
    spare = {"num_tasks": 0, "num_threads": spare_threads, "num_descriptors": 0}
    return [
        f"{name}: {getattr(now[name], field)} {field.removeprefix('num_')}, {getattr(old, field)} before"
        for name, old in before.items()
        for field in spare
        if getattr(now[name], field) > getattr(old, field) + spare[field]
    ]


def memory_mb(cluster: Cluster) -> dict[str, float]:
    """Memory that each process has for itself alone, in MB."""
    return {name: process.memory_full_info().uss / 1e6 for name, process in cluster.processes().items()}


def slope(samples: Sequence[tuple[int, float]]) -> float:
    """MB per thousand requests: the least-squares line through (requests, MB)."""
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    square = sum((x - mean_x) ** 2 for x, _ in samples)
    return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in samples) / square if square else 0.0


@dataclass(slots=True)
class Findings:
    """What one cluster held before and after, and how its memory went."""

    phases: Counter[str]
    start: dict[str, Load]
    end: dict[str, Load]
    before: dict[str, Footprint]
    after: dict[str, Footprint]
    memory: dict[str, list[tuple[int, float]]]
    elapsed_s: float

    def failures(self, *, spare_threads: int = 0) -> list[str]:
        """Everything that is held although nobody is there any more; `spare_threads` as for `excess`."""
        found = [f"{name} still holds something: {load}" for name, load in self.end.items() if not is_idle(load)]
        found += [
            f"{name}: {available(load)} blocks are free or cached, {available(self.start[name])} were"
            for name, load in self.end.items()
            if available(load) != available(self.start[name])
        ]
        return found + excess(self.before, self.after, spare_threads=spare_threads)


def measure(cluster: Cluster, *, count: int, seed: int) -> Findings:
    """Warms up, gives `count` requests up, and looks at what is left."""
    prompts = token_prompts(_NUM_PROMPTS, seed=seed, min_tokens=8, max_tokens=320)
    start = cluster.wait_until_idle()
    run(abandon_all(cluster, prompts, count=min(_WARM_UP, count), seed=-seed))
    cluster.wait_until_idle()
    before = footprints(cluster)
    phases: Counter[str] = Counter()
    memory: dict[str, list[tuple[int, float]]] = {}
    started = time.monotonic()
    for number in range(_NUM_ROUNDS):
        share = count // _NUM_ROUNDS + (number < count % _NUM_ROUNDS)
        phases += run(abandon_all(cluster, prompts, count=share, seed=seed * 1000 + number))
        for name, megabytes in memory_mb(cluster).items():
            memory.setdefault(name, []).append((phases.total(), megabytes))
    elapsed_s = time.monotonic() - started
    # What is not idle or back within these seconds is reported from the counts themselves.
    with contextlib.suppress(AssertionError):
        cluster.wait_until_idle()
        wait_until(lambda: excess(before, footprints(cluster)), lambda found: not found, timeout_s=20)
    return Findings(phases, start, cluster.loads(), before, footprints(cluster), memory, elapsed_s)


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=600, full=10_000)
    with Cluster(*FLAGS) as cluster:
        print(cluster.command)
        found = measure(cluster, count=size.count, seed=size.seed)
    print_table(
        f"{size.count} given up in {found.elapsed_s:.0f} s, seed {size.seed}",
        ("phase", "requests"),
        sorted(found.phases.items()),
    )
    print_table(
        "before → after",
        ("process", "free + cached blocks", "tasks", "threads", "descriptors"),
        [[name, *(f"{then} → {now}" for then, now in _pairs(found, name))] for name in sorted(found.before)],
    )
    print_table(
        "memory of each process alone, MB",
        ("process", "first", "last", "per 1,000 requests", "second half, per 1,000"),
        [
            [name, samples[0][1], samples[-1][1], slope(samples), slope(samples[len(samples) // 2 :])]
            for name, samples in sorted(found.memory.items())
        ],
    )
    return verdict(found.failures())


def available(load: Load) -> int:
    """Blocks that anybody may take."""
    return load.free_blocks + load.cached_blocks


def _pairs(found: Findings, name: str) -> list[tuple[object, object]]:
    blocks: tuple[object, object] = ("-", "-")
    if name in found.end:
        blocks = (available(found.start[name]), available(found.end[name]))
    before, after = astuple(found.before[name]), astuple(found.after[name])
    return [blocks, *zip(before, after, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
