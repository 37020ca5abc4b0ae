"""Bar: handing a prompt over costs the first token at most 5 % over shared memory, at most 10 % over TCP.

Three systems serve the same weights: one prefills where it decodes, two hand over. They alternate in one run, stopped
outside their turns; every worker may use `--threads` threads, since one stream keeps one of them busy at a time. A turn
is some requests of W1's prompt, one after the other, each of its own. The bar is on the median round's ratio of median
times to first token. Also shown: how far the second token is behind the first, which is where the blocks that are still
on their way are waited for, and where each system says that the time went.
"""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.freeze import Turns, settle
from bench.local_server import LocalServer
from bench.make_checkpoint import CheckpointFormat, make_checkpoint
from bench.run import checkpoint
from bench.shapes import SHAPES
from bench.workload import W1, Workload, plan_round
from staffetta.rpc.channel import open_channel
from staffetta.v1 import inference_pb2, inference_pb2_grpc
from tests.bars.report import print_table, spread, verdict
from tests.loop import run

MOST_ADDED: Final = {"shm": 0.05, "tcp": 0.10}
"""By transport: what it may add to the time to first token, as a share of the colocated one."""
COLOCATED: Final = "colocated"
OUTPUT_TOKENS: Final = 4
_VOCAB_SIZE: Final = 30_000
_REQUEST_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, in milliseconds: until its first token, from there to its second, and the phases it was told."""

    ttft_ms: float
    second_ms: float
    gateway_ms: float
    queue_ms: float
    prefill_ms: float
    transfer_ms: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What one system did in one round."""

    samples: tuple[Sample, ...]

    def median(self, name: str) -> float:
        """Of one of the samples' fields."""
        return statistics.median(float(getattr(sample, name)) for sample in self.samples)


def systems(model: Path, *, threads: int) -> list[LocalServer]:
    """The colocated system and one for each transport. Those that hand over may not prefill where they decode."""
    flags = ("--dtype", "bfloat16", "--kv-memory", "512MiB", "--threads", str(threads))
    handing_over = ("--prefill", "1", "--no-local-prefill")
    return [
        LocalServer(COLOCATED, model, ("--prefill", "0", *flags)),
        *(LocalServer(name, model, (*handing_over, "--transports", name, *flags)) for name in MOST_ADDED),
    ]


async def take_turn(server: LocalServer, *, seed: str, num_requests: int) -> Turn:
    """Some requests, one after the other; one more before them is not counted, and waits for what was stopped."""
    channel = open_channel(server.grpc)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    workload = Workload(name="W1", prompt_tokens=W1.prompt_tokens, output_tokens=1, num_requests=num_requests + 1)
    (phase,) = plan_round(workload, seed=f"{seed}/{server.name}", vocab_size=_VOCAB_SIZE)
    try:
        samples = [await _ask(stub, server.name, request.prompt) for request in phase.requests]
    finally:
        await channel.close()
    return Turn(tuple(samples[1:]))


async def _ask(stub: "inference_pb2_grpc.InferenceServiceAsyncStub", system: str, prompt: Sequence[int]) -> Sample:
    """One request."""
    request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(token_ids=prompt))
    request.sampling.temperature = 0.0
    request.sampling.max_tokens = OUTPUT_TOKENS
    request.sampling.ignore_eos = True
    sent = time.perf_counter()
    moments: list[float] = []
    finished = inference_pb2.GenerateFinished()
    async for message in stub.Generate(request, timeout=_REQUEST_S, wait_for_ready=True):
        if message.delta.tokens:
            moments.append(time.perf_counter())
        if message.HasField("finished"):
            finished = message.finished
    return sample_of(system, sent, moments, finished)


def sample_of(system: str, sent: float, moments: Sequence[float], finished: inference_pb2.GenerateFinished) -> Sample:
    """What a request tells, from when it was sent and its tokens came, in seconds of one clock.

    Raises RuntimeError for a prompt that did not come the way that the system is named after, or came from a cache.
    """
    transport = finished.handoff.transport or COLOCATED
    if transport != system or finished.usage.cached_tokens or finished.handoff.prefill_cached_tokens:
        raise RuntimeError(f"a prompt of {system} came over {transport}: {finished.handoff} {finished.usage}")
    timings = finished.timings
    return Sample(
        ttft_ms=(moments[0] - sent) * 1e3,
        second_ms=(moments[1] - moments[0]) * 1e3,
        gateway_ms=timings.gateway_s * 1e3,
        queue_ms=timings.queue_s * 1e3,
        prefill_ms=timings.prefill_s * 1e3,
        transfer_ms=timings.transfer_s * 1e3,
    )


def measure(model: Path, *, threads: int, rounds: int, num_requests: int, seed: str) -> dict[str, list[Turn]]:
    """Every system's turns, round by round; who begins a round changes."""
    with ExitStack() as stack:
        servers = [stack.enter_context(server) for server in systems(model, threads=threads)]
        for server in servers:
            print(server.command, flush=True)
        settle([server.pid for server in servers])
        turns: dict[str, list[Turn]] = {server.name: [] for server in servers}
        with Turns({server.name: server.pid for server in servers}) as schedule:
            for number in range(rounds):
                first = number % len(servers)
                for server in servers[first:] + servers[:first]:
                    with schedule.turn(server.name):
                        turn = run(take_turn(server, seed=f"{seed}/{number}", num_requests=num_requests))
                    turns[server.name].append(turn)
    return turns


def added(turns: dict[str, list[Turn]], system: str) -> list[float]:
    """What a system adds to the colocated time to first token, as a share of it, round by round."""
    ours = [turn.median("ttft_ms") for turn in turns[system]]
    beside = [turn.median("ttft_ms") for turn in turns[COLOCATED]]
    return [(with_it - without) / without for with_it, without in zip(ours, beside, strict=True)]


def report(title: str, turns: dict[str, list[Turn]]) -> list[str]:
    """Prints one model's table; returns the bars it missed."""
    rows: list[list[object]] = []
    failures: list[str] = []
    for system, of_rounds in turns.items():
        shares = added(turns, system)
        percents = [share * 100 for share in shares]
        medians = {
            name: spread([turn.median(name) for turn in of_rounds], digits=1) for name in Sample.__dataclass_fields__
        }
        rows.append([system, medians.pop("ttft_ms"), spread(percents, digits=1), *medians.values()])
        most = MOST_ADDED.get(system)
        if most is not None and statistics.median(shares) > most:
            failures.append(f"{title}: {system} adds {statistics.median(percents):.1f} %, the bar is {most:.0%}")
    headers = ("system", "TTFT ms", "added %", "second token after ms", "gateway", "queue", "prefill", "transfer after")
    print_table(f"{title}: {W1.prompt_tokens} prompt tokens, one stream", headers, rows)
    return failures


def _model(directory: Path | None, stored: CheckpointFormat) -> Path:
    """The checkpoint that was given, written there when absent; else the bench's own."""
    if directory is None:
        return checkpoint("0.5b", stored)
    if not (directory / "config.json").is_file():
        make_checkpoint(directory, SHAPES["0.5b"], seed=1, stored=stored)
    return directory


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for stored in CheckpointFormat:
        parser.add_argument(
            f"--{stored.value}", type=Path, metavar="DIR", help=f"{stored.value} weights of the 0.5b shape"
        )
    parser.add_argument("--only", choices=[each.value for each in CheckpointFormat], help="measures one of the two")
    parser.add_argument("--rounds", type=int, default=7, help="the median of them counts; default 7")
    parser.add_argument("--requests", type=int, default=4, help="in a turn; default 4")
    parser.add_argument("--threads", type=int, default=2, help="of each worker; default 2")
    parser.add_argument("--seed", default=str(time.time_ns()), help="draws prompts; default: the time")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: nobody is left stopped
    print(f"seed {options.seed}")
    failures: list[str] = []
    for stored in CheckpointFormat:
        if options.only in (None, stored.value):
            model = _model(getattr(options, stored.value), stored)
            sizes = {"rounds": options.rounds, "num_requests": options.requests}
            turns = measure(model, threads=options.threads, seed=options.seed, **sizes)
            failures += report(stored.value, turns)
    return verdict(failures)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
