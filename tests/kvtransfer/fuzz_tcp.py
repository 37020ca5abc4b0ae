"""Throws random and mutated bytes at all parsers of the framing: `python -m tests.kvtransfer.fuzz_tcp --cases 1000000`.

A parser may return a value within its documented bounds or raise FrameError. Anything else is a finding and ends the
run with the bytes that caused it.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from kvtransfer.frames import (
    MAX_FRAME_UNITS,
    REQUEST_HEAD_BYTES,
    FrameError,
    PoolShape,
    Region,
    Run,
    WelcomeStatus,
    encode_hello,
    encode_reply,
    encode_request,
    encode_welcome,
    parse_hello,
    parse_reply,
    parse_request_head,
    parse_runs,
    parse_welcome,
)
from kvtransfer.ticket import TicketVerdict

NUM_UNITS = 600
EXPECTED_BYTES = 12345


class Counts(NamedTuple):
    """What became of the cases."""

    num_parsed: int
    num_refused: int


def parse_request(data: bytes) -> None:
    """Parses as the server does, and checks that what it would serve is inside the pool and bounded."""
    head = parse_request_head(data[:REQUEST_HEAD_BYTES])
    runs = parse_runs(data[REQUEST_HEAD_BYTES:], num_runs=head.num_runs, num_units=NUM_UNITS)
    assert len(head.ticket) == 16
    assert 1 <= len(runs) <= sum(run.num_units for run in runs) <= MAX_FRAME_UNITS
    assert all(0 <= run.first < run.first + run.num_units <= NUM_UNITS for run in runs)
    packed = encode_request(head.region, head.ticket, runs)
    assert packed == data[:5] + b"\0" + data[6:]  # byte 5 is reserved


def parse_any_hello(data: bytes) -> None:
    assert len(parse_hello(data)) == 32


def parse_any_welcome(data: bytes) -> None:
    status, shape = parse_welcome(data)
    assert status in WelcomeStatus
    assert all(0 <= size < 2**64 for size in shape)


def parse_any_reply(data: bytes) -> None:
    verdict = parse_reply(data, expected_bytes=EXPECTED_BYTES)
    assert verdict in TicketVerdict


def make_valid(rng: random.Random, parser: Callable[[bytes], None]) -> bytes:
    if parser is parse_any_hello:
        return encode_hello(rng.randbytes(32))
    if parser is parse_any_welcome:
        shape = PoolShape(rng.getrandbits(20), rng.getrandbits(20), rng.getrandbits(20))
        return encode_welcome(rng.choice(list(WelcomeStatus)), shape)
    if parser is parse_any_reply:
        return encode_reply(TicketVerdict.VALID, EXPECTED_BYTES)
    runs = [Run(rng.randrange(NUM_UNITS), rng.randrange(1, 40)) for _ in range(rng.randrange(1, 8))]
    return encode_request(rng.choice(list(Region)), rng.randbytes(16), runs)


def mutate(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(80))
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 20))
    if kind == 3:
        return data
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 255, rng.randrange(256)))
    return bytes(changed)


def fuzz(*, num_cases: int, seed: int) -> Counts:
    """Runs the cases; raises on the first finding."""
    rng = random.Random(seed)
    parsers = [parse_request, parse_any_hello, parse_any_welcome, parse_any_reply]
    num_refused = 0
    for case in range(num_cases):
        parser = parsers[case % len(parsers)]
        data = mutate(rng, make_valid(rng, parser))
        try:
            parser(data)
        except FrameError:
            num_refused += 1
        except BaseException:
            print(f"case {case} of seed {seed}: {parser.__name__}({data!r})", file=sys.stderr)
            raise
    return Counts(num_cases - num_refused, num_refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    counts = fuzz(num_cases=arguments.cases, seed=arguments.seed)
    print(f"{arguments.cases} cases in {time.perf_counter() - start:.0f} s: {counts}")


if __name__ == "__main__":
    main()
