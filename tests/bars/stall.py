"""Bar: streams keep their pace while a long prompt is prefilled in the same process.

`--streams` generations run on one decode worker without a prefill worker. Each round: their gaps alone, then, with a
prompt of 2,000 tokens, their gaps until its first token. The bar is that the 99th percentile of the latter is at most
2.5 times the median of the former, in the median round: other work on the machine shows at once. The prompt's time to
first token without and with streams is shown, too.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from bench.local_server import LocalServer
from bench.make_checkpoint import CheckpointFormat
from bench.record import percentile
from bench.run import checkpoint
from bench.workload import Workload, plan_round
from staffetta.rpc.channel import open_channel
from staffetta.v1 import inference_pb2, inference_pb2_grpc
from tests.bars.report import print_table, verdict
from tests.loop import run

MOST_TIMES_IDLE: Final = 2.5
PROMPT_TOKENS: Final = 2000
_STREAM: Final = Workload(name="stream", prompt_tokens=64, output_tokens=1)
_PROMPT: Final = Workload(name="prompt", prompt_tokens=PROMPT_TOKENS, output_tokens=1)
_VOCAB_SIZE: Final = 30_000
_IDLE_GAPS: Final = 32
_MAX_TOKENS: Final = 1500
"""Of a stream: more than any round lasts."""


@dataclass(slots=True)
class Stream:
    """One generation: when each of its messages with tokens came."""

    arrivals: list[float] = field(default_factory=list)

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between tokens, of gaps that ended in [begin, end)."""
        return [later - earlier for earlier, later in pairwise(self.arrivals) if begin <= later < end]


@dataclass(frozen=True, slots=True)
class Round:
    """Gaps in seconds without and beside the prompt; the prompt's time to first token alone and beside streams."""

    idle: tuple[float, ...]
    beside: tuple[float, ...]
    ttft_alone_s: float
    ttft_beside_s: float

    @property
    def ratio(self) -> float:
        """The 99th percentile beside the prompt as a multiple of the median without."""
        return percentile(self.beside, 99) / statistics.median(self.idle)

    def cells(self) -> list[float]:
        """Its part of the table."""
        gaps = [statistics.median(self.idle), percentile(self.idle, 99)]
        gaps += [statistics.median(self.beside), percentile(self.beside, 99), max(self.beside)]
        return [*(gap * 1e3 for gap in gaps), self.ratio, self.ttft_alone_s, self.ttft_beside_s]


class Load:
    """What one round asks of a server. Event loop only."""

    def __init__(self, grpc: str, *, num_streams: int, num_idle: int, seed: str) -> None:
        self._channel = open_channel(grpc)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._num_streams = num_streams
        self._num_idle = num_idle
        self._seed = seed

    async def run(self) -> Round:
        """One round; the server is idle before and after it."""
        ttft_alone_s = await self._first_token_s("alone")
        streams = [Stream() for _ in range(self._num_streams)]
        tasks = [asyncio.create_task(self._generate(stream, str(n))) for n, stream in enumerate(streams)]
        try:
            await self._all_have(streams, tasks, 4)
            began = time.perf_counter()
            await self._all_have(streams, tasks, 4 + self._num_idle)
            sent = time.perf_counter()
            ttft_beside_s = await self._first_token_s("beside")
            ended = time.perf_counter()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._channel.close()
        idle = [gap for stream in streams for gap in stream.gaps(began, sent)]
        beside = [gap for stream in streams for gap in stream.gaps(sent, ended)]
        return Round(tuple(idle), tuple(beside), ttft_alone_s, ttft_beside_s)

    async def _all_have(self, streams: Sequence[Stream], tasks: Sequence["asyncio.Task[None]"], count: int) -> None:
        while any(len(stream.arrivals) < count for stream in streams):
            done, _ = await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
                raise RuntimeError("a stream ended before the round did")

    async def _generate(self, stream: Stream, name: str) -> None:
        async for message in self._stub.Generate(self._request(_STREAM, name, max_tokens=_MAX_TOKENS)):
            if message.delta.tokens:
                stream.arrivals.append(time.perf_counter())

    async def _first_token_s(self, name: str) -> float:
        sent = time.perf_counter()
        moments = [
            time.perf_counter()
            async for message in self._stub.Generate(self._request(_PROMPT, name, max_tokens=1))
            if message.delta.tokens
        ]
        return moments[0] - sent

    def _request(self, workload: Workload, name: str, *, max_tokens: int) -> inference_pb2.GenerateRequest:
        (phase,) = plan_round(workload, seed=f"{self._seed}/{name}", vocab_size=_VOCAB_SIZE)
        request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(token_ids=phase.requests[0].prompt))
        request.sampling.temperature = 0.0
        request.sampling.max_tokens = max_tokens
        request.sampling.ignore_eos = True
        return request


async def measure(grpc: str, *, num_streams: int, seed: str) -> Round:
    """One round on a server."""
    return await Load(grpc, num_streams=num_streams, num_idle=_IDLE_GAPS, seed=seed).run()


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a model directory; default: random weights of the 0.5b shape")
    parser.add_argument("--rounds", type=int, default=3, help="the median of them counts")
    parser.add_argument("--streams", type=int, nargs="+", default=[4], help="how many run at a time; default 4")
    parser.add_argument("--max-slowdown", default="", help="passed to the worker; default: the worker's own")
    options = parser.parse_args(argv)
    model = options.model or checkpoint("0.5b", CheckpointFormat.BF16)
    flags = ["--prefill", "0", "--dtype", "bfloat16", "--kv-memory", "1GiB"]
    flags += ["--max-slowdown", options.max_slowdown] if options.max_slowdown else []
    rows: list[list[object]] = []
    ratios: dict[int, list[float]] = {num_streams: [] for num_streams in options.streams}
    with LocalServer("colocated", model, flags) as server:
        print(server.command)
        for number in range(options.rounds):
            for num_streams in options.streams:
                found = run(measure(server.grpc, num_streams=num_streams, seed=f"{number}/{num_streams}"))
                ratios[num_streams].append(found.ratio)
                rows.append([num_streams, *found.cells()])
    failures = [
        f"{statistics.median(of_rounds):.2f} times the idle gap beside {num_streams} streams"
        for num_streams, of_rounds in ratios.items()
        if statistics.median(of_rounds) > MOST_TIMES_IDLE
    ]
    headers = ("streams", "idle p50 ms", "p99", "beside p50", "p99", "max", "p99 / idle", "TTFT alone s", "beside s")
    print_table(f"a prompt of {PROMPT_TOKENS} tokens beside streams", headers, rows)
    return verdict(failures)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
