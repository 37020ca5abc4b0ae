"""What a gateway costs between engine and client: `python -m tests.bars.relay`.

Workers without an engine send a token to each of 256 sequences every step; 256 clients stream from a gateway. Bars, of
one gateway process on one core: at most 50 µs of processor time per token, which is 20,000 tokens a second of a core;
and at most 1 ms between worker and client, at the median and in steps of 16 ms, beyond what sockets and client take by
themselves. That part is measured with a server in the gateway's place that only writes frames of the same size.

The strict row has one worker, so that all 256 tokens of a step come in one message, and half of them are written before
the median one. Beside it: the same streams from 8 workers of 32 each, whose steps begin one after the other, which is
what a system looks like; and two gateway processes on both cores. `transport` is the floor of any server in Python:
uvloop's transports, written to in a loop. Workers and clients share the core that the gateway leaves. Times need an
idle machine; processor time does not.
"""

import argparse
import asyncio
import json
import math
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
from staffetta.rpc.channel import open_channel
from staffetta.v1 import common_pb2, decode_pb2, registry_pb2, registry_pb2_grpc
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
_READY: Final = re.compile(r"REST on http://([^\s,]+), gRPC on ([^\s,]+)(?:, registry on ([^\s,]+))?")


class Figures(NamedTuple):
    """What one run showed: tokens a second, delays from worker to client, and the server's processor time per token."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


class Setup(NamedTuple):
    """What is between 256 streams and their tokens: so many decode workers, and gateway processes or a stand-in."""

    between: str
    num_workers: int = 1
    num_processes: int = 1


class PacedWorker(FakeDecodeWorker):
    """Waits for its requests, then gives each a token per step."""

    def __init__(self, digest: str, token_ids: Sequence[int], *, number: int, num_streams: int) -> None:
        super().__init__(digest, worker_id=f"decode-{number}", reply=None)
        self.max_requests = 2 * NUM_STREAMS
        self.num_streams = num_streams
        self._token_ids = token_ids

    async def run_steps(self, *, start: float, num_steps: int, step_s: float) -> list[int]:
        """Sends `num_steps` steps, the first at `start` on the loop's clock; when each was handed over, in ns."""
        steps = [
            [(self._pipes[ids[0]], self._step(ids, index, num_steps)) for ids in self.requests_by_session()]
            for index in range(num_steps)
        ]
        loop = asyncio.get_running_loop()
        sent: list[int] = []
        for index, messages in enumerate(steps):
            await asyncio.sleep(max(0.0, start + index * step_s - loop.time()))
            sent.append(time.monotonic_ns())
            for pipe, message in messages:
                pipe.send(message)
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


ROWS: Final = (
    (PACE_S, Setup("null")),
    (PACE_S, Setup("transport")),
    (PACE_S, Setup("gateway")),
    (PACE_S, Setup("null", num_workers=8)),
    (PACE_S, Setup("gateway", num_workers=8)),
    (PACE_S, Setup("gateway", num_processes=2)),
    (PACE_S, Setup("gateway", num_workers=8, num_processes=2)),
    (FULL_PACE_S, Setup("null")),
    (FULL_PACE_S, Setup("gateway")),
)
"""The table. Rows of several processes set no bar: on two cores they share one with workers and clients."""


@contextmanager
def pinned(*numbers: int) -> Iterator[None]:
    """Processes started inside run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[number % len(before)] for number in numbers})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def started(cores: Sequence[int], *arguments: str, stderr: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python process on some cores; ended with the block."""
    with pinned(*cores):
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def _part(name: str, num_steps: int, *arguments: str) -> tuple[str, ...]:
    size = ("--streams", str(NUM_STREAMS), "--tokens", str(num_steps))
    return "-m", "tests.bars.relay_peers", name, *size, *arguments


def _figures(sent: Sequence[Sequence[int]], arrivals: Sequence[tuple[int, Sequence[int]]], *, cpu_s: float) -> Figures:
    """`sent` has when each worker's steps began, `arrivals` each client's worker and when its tokens came, in ns."""
    counted = [(number, stream[_NUM_WARM:]) for number, stream in arrivals]
    delays = [
        (at - since) / 1e6
        for number, stream in counted
        for since, at in zip(sent[number][_NUM_WARM:], stream, strict=True)
    ]
    cuts = statistics.quantiles(delays, n=100)
    seconds = (max(stream[-1] for _, stream in counted) - min(stream[0] for _, stream in counted)) / 1e9
    num_tokens = sum(len(stream) for _, stream in arrivals)
    return Figures(
        NUM_STREAMS * (len(counted[0][1]) - 1) / seconds, cuts[49], cuts[98], cpu_us=1e6 * cpu_s / num_tokens
    )


def _output(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.read()


def measure_stand_in(setup: Setup, *, num_steps: int, step_s: float) -> Figures:
    """The way without a gateway."""
    flags = ("--groups", str(setup.num_workers), "--step-s", str(step_s))
    with started([0], *_part(setup.between, num_steps, *flags)) as server:
        assert server.stdout is not None
        address = f"127.0.0.1:{server.stdout.readline().strip()}"
        with started([1], *_part("client", num_steps, "--address", address)) as client:
            arrivals = json.loads(_output(client))
        said = json.loads(_output(server))
    return _figures(said["began"], arrivals, cpu_s=said["cpu_s"])


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def _relay(setup: Setup, rest: str, registry: str, process_id: int, *, num_steps: int, step_s: float) -> Figures:
    model = load_model(ModelConfig())
    token_ids = model.text.encode(" the and of to in")
    num_each = NUM_STREAMS // setup.num_workers
    workers = [
        PacedWorker(model.digest, token_ids, number=number, num_streams=num_each) for number in range(setup.num_workers)
    ]
    parent = psutil.Process(process_id)
    gateway = [parent, *parent.children()]
    try:
        for worker in workers:
            await worker.start(registry)
        await _until_open(registry, setup.num_workers)
        with started([1], *_part("client", num_steps, "--address", rest)) as client:
            output = asyncio.create_task(asyncio.to_thread(_output, client))
            while sum(worker.starts.qsize() for worker in workers) < NUM_STREAMS:  # noqa: ASYNC110 - queues tell nothing
                await asyncio.sleep(0.01)
            start = asyncio.get_running_loop().time() + 0.2
            costs = asyncio.create_task(_cost_of_steps(gateway, start, num_steps=num_steps, step_s=step_s))
            sent = await asyncio.gather(
                *(
                    worker.run_steps(start=start + number * step_s / len(workers), num_steps=num_steps, step_s=step_s)
                    for number, worker in enumerate(workers)
                )
            )
            arrivals = json.loads(await output)
            cpu_s = await costs
    finally:
        for worker in workers:
            await worker.stop()
    return _figures(sent, arrivals, cpu_s=cpu_s)


async def _cost_of_steps(gateway: Sequence[psutil.Process], start: float, *, num_steps: int, step_s: float) -> float:
    """Processor seconds of all steps but the last, in which every request ends; as if that were like the others."""
    now = asyncio.get_running_loop().time
    await asyncio.sleep(start - now())
    before = _cpu_s(gateway)
    await asyncio.sleep(start + (num_steps - 1) * step_s - now())
    return (_cpu_s(gateway) - before) * num_steps / (num_steps - 1)


async def _until_open(registry: str, num_workers: int) -> None:
    """Waits until every gateway process has a session to every worker."""
    async with open_channel(registry) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        while True:
            listed = (await stub.ListWorkers(registry_pb2.ListWorkersRequest())).workers
            if len(listed) == num_workers and all(worker.has_session for worker in listed):
                return
            await asyncio.sleep(0.01)


def measure_gateway(setup: Setup, *, num_steps: int, step_s: float) -> Figures:
    """The way through a gateway of its own."""
    doors = ("http", "grpc", "registry") if setup.num_processes > 1 else ("http", "grpc")
    ports = (f"--{door}=127.0.0.1:0" for door in doors)
    flags = (f"--cluster-key={CLUSTER_KEY}", f"--heartbeat-s={HEARTBEAT_S}", f"--workers={setup.num_processes}")
    cores = range(setup.num_processes)
    with started(cores, "-m", "gateway", *ports, *flags, stderr=subprocess.PIPE) as gateway:
        assert gateway.stderr is not None
        ready = next(found for line in gateway.stderr if (found := _READY.search(line)))
        reader = threading.Thread(target=gateway.stderr.read)
        reader.start()
        with pinned(1):
            run = asyncio.run(
                _relay(setup, ready[1], ready[3] or ready[2], gateway.pid, num_steps=num_steps, step_s=step_s)
            )
        gateway.terminate()
        reader.join()
        return run


def _medians(runs: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*runs, strict=True)))


def _measure(setup: Setup, *, num_steps: int, step_s: float) -> Figures:
    measure = measure_gateway if setup.between == "gateway" else measure_stand_in
    return measure(setup, num_steps=num_steps, step_s=step_s)


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="of which each figure is the median")
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)), help="which rows, from 0 on; all")
    asked = parser.parse_args()
    found: dict[tuple[float, Setup], Figures] = {}
    chosen = [ROWS[number] for number in asked.rows]
    for step_s, setup in chosen:
        num_steps = int(asked.seconds / step_s)
        runs = [_measure(setup, num_steps=num_steps, step_s=step_s) for _ in range(asked.rounds)]
        found[step_s, setup] = _medians(runs)
    rows: list[tuple[object, ...]] = []
    failures: list[str] = []
    for (step_s, setup), run in found.items():
        null = found.get((step_s, Setup("null", setup.num_workers)))
        added_ms = run.p50_ms - null.p50_ms if null is not None else math.nan
        pace = f"{1e3 * step_s:g} ms"
        between = f"{setup.num_processes} gateway processes" if setup.num_processes > 1 else setup.between
        rows.append((pace, setup.num_workers, between, *run, added_ms))
        if setup.between != "gateway" or setup.num_processes > 1:
            continue
        if run.cpu_us > MAX_CPU_US:
            failures.append(f"{pace}: {run.cpu_us:.1f} µs of processor time per token, at most {MAX_CPU_US:g}")
        if step_s == PACE_S and added_ms > MAX_ADDED_MS:
            failures.append(
                f"{pace}, {setup.num_workers} workers: {added_ms:.2f} ms added at the median, at most {MAX_ADDED_MS:g}"
            )
        if step_s == FULL_PACE_S and run.rate < MIN_RATE:
            failures.append(f"{pace}: {run.rate:,.0f} tokens a second passed, at least {MIN_RATE:,}")
    print_table(
        f"{NUM_STREAMS} streams, a token each per step, medians of {asked.rounds}",
        ("step", "workers", "between", "tokens/s", "p50 ms", "p99 ms", "µs/token", "p50 added"),
        rows,
    )
    return verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
