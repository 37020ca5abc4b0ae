"""What a step costs besides computing it: `python -m bench.engine_overhead`.

An engine whose runner only reads memory, as weights are read, goes through its queues with so many streams, and a
decode worker's event loop turns every output into the message that a gateway gets. Processor time of the one thread
that does it, per step, beside what a step of a model costs: `--step-ms` names that. `--read-mib 0` leaves the caches
warm, as no model does, and what is measured is a half of that, with one stream a sixth.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from bench.table import format_table
from decode_svc.active import ActiveRequest, GatewaySession, News
from decode_svc.handoff import HandoffRecord
from engine.engine import Engine, EngineLimits
from engine.request import Request, RequestId, RequestKind, SampledToken, SamplingParams, StepOutput
from engine.step import NothingBegun, SequenceSlice, SliceResult
from staffetta.hashing import BlockHasher
from staffetta.v1 import decode_pb2

T = TypeVar("T")

_BLOCK_SIZE: Final = 16
_PROMPT_TOKENS: Final = 128
_WARM_UP_STEPS: Final = 32


@dataclass(frozen=True, slots=True)
class Overhead:
    """Microseconds of processor time per step: medians."""

    batch: int
    engine_us: float
    """Planning, applying, committing, reporting."""
    message_us: float
    """From an output to the bytes for the gateway."""


class ReadingRunner(NothingBegun):
    """The `engine.step.Runner` that computes nothing: every draw is token 1. It reads `num_bytes` in every step."""

    def __init__(self, num_bytes: int = 0) -> None:
        self._weights = np.ones(num_bytes // 8, dtype=np.int64)
        self.spent_ns = 0
        """Processor time of this thread in all steps so far."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        """One token for every draw."""
        began = time.thread_time_ns()
        self._weights.sum()
        self.spent_ns += time.thread_time_ns() - began
        return [
            SliceResult() if part.draw is None else SliceResult((SampledToken(part.draw.output_index, 1),))
            for part in slices
        ]


def measure_overhead(batch: int, *, num_steps: int, read_bytes: int = 0) -> Overhead:
    """Measures steps of `batch` streams that all go on; each reads so many bytes before."""
    runner = ReadingRunner(read_bytes)
    engine = _make_engine(runner, batch, num_steps=num_steps + _WARM_UP_STEPS)
    for _ in range(_WARM_UP_STEPS):
        engine.step()
    engine_us: list[float] = []
    message_us: list[float] = []
    encoder = _Encoder(batch)
    for _ in range(num_steps):
        spent_ns = runner.spent_ns
        output, elapsed_us = _timed(engine.step)
        if output is None or len(output.outputs) != batch:
            raise RuntimeError(f"a step of {batch} streams brought {output}")
        engine_us.append(elapsed_us - (runner.spent_ns - spent_ns) / 1e3)
        _, elapsed_us = _timed(lambda output=output: encoder.encode(output))  # type: ignore[misc]
        message_us.append(elapsed_us)
    return Overhead(batch, statistics.median(engine_us), statistics.median(message_us))


class _Encoder:
    """The last part of `decode_svc.servicer`, without a stream at its end."""

    def __init__(self, batch: int) -> None:
        self._active: dict[RequestId, ActiveRequest] = {}
        self._session = GatewaySession("session", "gateway", _Encoding())  # type: ignore[arg-type]
        for number in range(batch):
            start = decode_pb2.StartRequest(request_id=_name(number))
            self._active[_name(number)] = ActiveRequest(self._session, start, (0,), HandoffRecord(), "decode-0", 0.0)

    def encode(self, output: StepOutput) -> None:
        news = News(self._session)
        for part in output.outputs:
            active = self._active[part.request_id]
            if not active.contradicts(part):
                active.take(part, news)
        news.send()


class _Encoding:
    """The pipe of a session: turns messages into bytes, and sends none."""

    def send(self, message: decode_pb2.DecodeSessionResponse) -> None:
        message.SerializeToString()


def _make_engine(runner: ReadingRunner, batch: int, *, num_steps: int) -> Engine:
    num_blocks = batch * -(-(_PROMPT_TOKENS + num_steps + 1) // _BLOCK_SIZE)
    engine = Engine(
        runner,
        num_blocks=num_blocks,
        hasher=BlockHasher(b"k" * 16, block_size=_BLOCK_SIZE),
        limits=EngineLimits(
            max_model_len=_PROMPT_TOKENS + num_steps + 1,
            max_batch_tokens=batch * _PROMPT_TOKENS,
            max_sequences=batch,
            max_requests=batch,
            prefix_caching=True,
        ),
    )
    sampling = SamplingParams(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        max_tokens=num_steps + 1,
        min_tokens=0,
        stop_token_ids=frozenset(),
        num_logprobs=None,
    )
    for number in range(batch):
        prompt = tuple(range(number, number + _PROMPT_TOKENS))
        engine.add(Request(_name(number), RequestKind.GENERATE, prompt, sampling, arrival=number))
    return engine


def _name(number: int) -> RequestId:
    return RequestId(f"{number:032x}")


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.thread_time_ns()
    result = work()
    return result, (time.thread_time_ns() - began) / 1e3


def main(argv: Sequence[str]) -> int:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="streams in a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--read-mib", type=int, default=64, help="read in every step: more than the caches hold")
    parser.add_argument("--step-ms", type=float, help="what a model's step takes, to compare with")
    options = parser.parse_args(argv)
    rows = []
    for batch in options.batches:
        found = measure_overhead(batch, num_steps=options.steps, read_bytes=options.read_mib * 2**20)
        total_us = found.engine_us + found.message_us
        share = total_us / options.step_ms / 10 if options.step_ms else None
        rows.append([batch, found.engine_us, found.message_us, total_us / batch, share])
    print(format_table(("streams", "engine µs", "message µs", "µs/token", "% of a step"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
