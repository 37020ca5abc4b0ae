"""What a gateway costs between engine and client: `python -m tests.bars.relay`.

A worker without an engine sends a token to each of 256 sequences every step, one message per step; 256 clients stream
from one gateway process that is pinned to a core. Bars: at most 50 µs of processor time per token, which is 20,000
tokens a second of one core; and at most 1 ms between worker and client, at the median and in steps of 16 ms, beyond
what sockets and client take by themselves. That part is measured with a server in the gateway's place that only writes
frames of the same size. Worker and clients share the other core. Times need an idle machine; processor time does not.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import psutil

from gateway.model import load_model
from staffetta.config.schema import ModelConfig
from staffetta.v1 import common_pb2, decode_pb2
from tests.bars.report import print_table, verdict
from tests.gateway.fakes import CLUSTER_KEY, HEARTBEAT_S, FakeDecodeWorker

MAX_CPU_US: Final = 50.0
MAX_ADDED_MS: Final = 1.0
MIN_RATE: Final = 20_000
NUM_STREAMS: Final = 256
PACE_S: Final = 0.016
FULL_PACE_S: Final = 0.0125
"""Of 20,480 tokens a second."""
_NUM_WARM: Final = 20
"""Steps at the beginning that are not counted: clients still arrive."""
_READY: Final = re.compile(r"REST on http://(\S+), gRPC on (\S+)")


class Figures(NamedTuple):
    """What one run showed: tokens a second, delays from worker to client, and the server's processor time per token."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


class PacedWorker(FakeDecodeWorker):
    """Waits for all requests, then gives each a token per step."""

    def __init__(self, digest: str, token_ids: Sequence[int]) -> None:
        super().__init__(digest, reply=None)
        self.max_requests = 2 * NUM_STREAMS
        self._token_ids = token_ids

    async def run_steps(self, *, num_steps: int, step_s: float) -> list[int]:
        """Sends `num_steps` steps; when each was handed to the session, in ns."""
        ids = [(await self.starts.get()).request_id for _ in range(NUM_STREAMS)]
        steps = [self._step(ids, index, num_steps) for index in range(num_steps)]
        loop = asyncio.get_running_loop()
        assert self._pipe is not None
        sent: list[int] = []
        start = loop.time()
        for index, step in enumerate(steps):
            await asyncio.sleep(max(0.0, start + index * step_s - loop.time()))
            sent.append(time.monotonic_ns())
            self._pipe.send(step)
        return sent

    def _step(self, ids: Sequence[str], index: int, num_steps: int) -> decode_pb2.DecodeSessionResponse:
        token_id = self._token_ids[index % len(self._token_ids)]
        is_last = index + 1 == num_steps
        reason = common_pb2.FINISH_REASON_LENGTH if is_last else common_pb2.FINISH_REASON_UNSPECIFIED
        events = [
            decode_pb2.SequenceEvent(
                request_id=one, tokens=[common_pb2.Token(index=index, token_id=token_id)], finish_reason=reason
            )
            for one in ids
        ]
        return decode_pb2.DecodeSessionResponse(step=decode_pb2.StepEvents(events=events))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes started inside run on one core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[core % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def started(core: int, *arguments: str, stderr: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python process on one core; ended with the block."""
    with pinned(core):
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def _part(name: str, num_steps: int, *arguments: str) -> tuple[str, ...]:
    size = ("--streams", str(NUM_STREAMS), "--tokens", str(num_steps))
    return "-m", "tests.bars.relay_peers", name, *size, *arguments


def _figures(sent: Sequence[int], arrivals: Sequence[Sequence[int]], *, cpu_us: float) -> Figures:
    """`sent` has when each step began, `arrivals` when its token came to each client, in ns."""
    counted = [stream[_NUM_WARM:] for stream in arrivals]
    delays = [(at - since) / 1e6 for stream in counted for since, at in zip(sent[_NUM_WARM:], stream, strict=True)]
    cuts = statistics.quantiles(delays, n=100)
    seconds = (max(stream[-1] for stream in counted) - min(stream[0] for stream in counted)) / 1e9
    return Figures(NUM_STREAMS * (len(counted[0]) - 1) / seconds, cuts[49], cuts[98], cpu_us)


def _output(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.read()


def measure_null(*, num_steps: int, step_s: float) -> Figures:
    """The way without a gateway."""
    with started(0, *_part("null", num_steps, "--step-s", str(step_s))) as server:
        assert server.stdout is not None
        address = f"127.0.0.1:{server.stdout.readline().strip()}"
        with started(1, *_part("client", num_steps, "--address", address)) as client:
            arrivals = json.loads(_output(client))
        sent = json.loads(_output(server))
    return _figures(sent, arrivals, cpu_us=0.0)


async def _measure_gateway(rest: str, registry: str, process_id: int, *, num_steps: int, step_s: float) -> Figures:
    model = load_model(ModelConfig())
    worker = PacedWorker(model.digest, model.text.encode(" the and of to in"))
    await worker.start(registry)
    gateway = psutil.Process(process_id)
    try:
        with started(1, *_part("client", num_steps, "--address", rest)) as client:
            output = asyncio.create_task(asyncio.to_thread(_output, client))
            while worker.starts.qsize() < NUM_STREAMS:  # noqa: ASYNC110 - a queue tells of no fullness
                await asyncio.sleep(0.01)
            before = sum(gateway.cpu_times()[:2])
            sent = await worker.run_steps(num_steps=num_steps, step_s=step_s)
            arrivals = json.loads(await output)
            seconds = sum(gateway.cpu_times()[:2]) - before
    finally:
        await worker.stop()
    return _figures(sent, arrivals, cpu_us=seconds * 1e6 / (NUM_STREAMS * num_steps))


def measure_gateway(*, num_steps: int, step_s: float) -> Figures:
    """The way through a gateway of its own."""
    flags = ("--http=127.0.0.1:0", "--grpc=127.0.0.1:0", f"--cluster-key={CLUSTER_KEY}", f"--heartbeat-s={HEARTBEAT_S}")
    with started(0, "-m", "gateway", *flags, stderr=subprocess.PIPE) as gateway:
        assert gateway.stderr is not None
        ready = next(found for line in gateway.stderr if (found := _READY.search(line)))
        reader = threading.Thread(target=gateway.stderr.read)
        reader.start()
        with pinned(1):
            run = asyncio.run(_measure_gateway(ready[1], ready[2], gateway.pid, num_steps=num_steps, step_s=step_s))
        gateway.terminate()
        reader.join()
        return run


def _medians(runs: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*runs, strict=True)))


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="of which each figure is the median")
    asked = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    failures: list[str] = []
    for step_s in (PACE_S, FULL_PACE_S):
        num_steps = int(asked.seconds / step_s)
        nulls: list[Figures] = []
        runs: list[Figures] = []
        for _ in range(asked.rounds):
            nulls.append(measure_null(num_steps=num_steps, step_s=step_s))
            runs.append(measure_gateway(num_steps=num_steps, step_s=step_s))
        null, run = _medians(nulls), _medians(runs)
        pace = f"{1e3 * step_s:g} ms"
        rows += [(pace, "nothing", *null), (pace, "gateway", *run)]
        if run.cpu_us > MAX_CPU_US:
            failures.append(f"{pace}: {run.cpu_us:.1f} µs of processor time per token, at most {MAX_CPU_US:g}")
        if step_s == PACE_S and (added_ms := run.p50_ms - null.p50_ms) > MAX_ADDED_MS:
            failures.append(f"{pace}: {added_ms:.2f} ms added at the median, at most {MAX_ADDED_MS:g}")
        if step_s == FULL_PACE_S and run.rate < MIN_RATE:
            failures.append(f"{pace}: {run.rate:,.0f} tokens a second passed, at least {MIN_RATE:,}")
    print_table(
        f"{NUM_STREAMS} streams, a token each per step, medians of {asked.rounds}",
        ("step", "between", "tokens/s", "p50 ms", "p99 ms", "µs/token"),
        rows,
    )
    return verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
