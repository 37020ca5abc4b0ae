"""Bar: tokens and log-probabilities have the same bits in every way in which the system can run a request.

Greedy and seeded requests for one to four choices over prompts of 1 to 1,500 tokens, with penalties, stop ids and
scored prompts, to models whose sizes are round nowhere and to the embedded one. Others ask for tokens alone, so that
steps are begun ahead and only those logits are computed that may be the largest: through the system, and in this
process, which counts them. The reference is each request alone, in
one process on one thread, its prompt in one step. Every way proves by the system's own counts that it was taken.
"""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bars.concurrent import run_all
from tests.bars.equal_tokens import NO_CACHE, RELAY, SINGLE
from tests.bars.report import parse_size, print_table, verdict
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import open_tokenizer
from tests.loop import run
from tests.same_tokens import ahead, observed, ways
from tests.same_tokens.ahead import ARITHMETICS, Arithmetic
from tests.same_tokens.asking import STREAMS, Asked, Streams, draw_requests, draw_streams
from tests.same_tokens.bits import AnswerBits, first_difference
from tests.same_tokens.models import ODD, TWINS, make_biased_model, make_odd_model, make_twins_model
from tests.same_tokens.observed import DECODE, PREFILL, Count
from tests.same_tokens.ways import Site, Taken, Way

WHOLE_PROMPTS: Final = 2048
FEW_BLOCKS: Final = ("--block-size", "4", "--num-blocks", "384")
"""Hardly more than the longest request needs alone."""
UNCACHED_DECODE: Final = {"STAFFETTA_DECODE_PREFIX_CACHING": "false"}
OWN_THREADS: Final = ("--prefill", "1", "--decode", "1", "--no-local-prefill")
"""Each role as the environment says; flags are for all."""

_NUM_STREAMS: Final = 32
"""So many that four greedy ones are computed together a few times, in a run of any size."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One system and the ways taken in it, in order."""

    flags: Sequence[str]
    ways: Sequence[Way]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """Requests to one model under one arithmetic, and the systems that have to agree; the first is the reference."""

    name: str
    model: str
    flags: Sequence[str]
    setups: Sequence[Setup]
    requests: Sequence[Asked]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one way brought, beside the reference."""

    family: str
    way: str
    system: str
    taken: Taken
    difference: str | None

    @property
    def failures(self) -> list[str]:
        """What is wrong: another bit, or a condition that did not occur."""
        where = f"{self.family}, {self.way} ({self.system})"
        found = [f"{where}: {self.difference}"] if self.difference else []
        found += [
            f"{where}: {condition}, at least {max(1, condition.num_demanded)} were to be"
            for condition in self.taken.conditions
            if not condition.is_met
        ]
        return found


def budget(num_tokens: int) -> tuple[str, str]:
    """The flag for a step's token budget."""
    return ("--max-batch-tokens", str(num_tokens))


REFERENCE: Final = Setup(
    (*SINGLE, NO_CACHE, *budget(WHOLE_PROMPTS)), (ways.REFERENCE, ways.batched(WHOLE_PROMPTS), ways.restarting())
)
TWO_THREADS: Final = Setup(
    (*SINGLE[:-1], "2", NO_CACHE, *budget(64)), (ways.cut_by(64), ways.batched(64, observed.on_two_threads(DECODE)))
)
SHM: Final = Setup(
    (*OWN_THREADS, NO_CACHE, "--transports", "shm"),
    (
        ways.handing_over("shm", observed.on_two_threads(PREFILL)),
        ways.restarting(observed.handed_over("shm"), observed.handed_over_bytes),
    ),
    {"STAFFETTA_PREFILL_THREADS": "2", "STAFFETTA_DECODE_THREADS": "1"},
)
TCP: Final = Setup(
    (*OWN_THREADS, "--transports", "tcp"),
    (
        ways.handing_over("tcp"),
        ways.PREFILL_HIT,
        ways.restarting(observed.handed_over("tcp"), observed.handed_over_bytes),
    ),
    {"STAFFETTA_PREFILL_THREADS": "1", "STAFFETTA_DECODE_THREADS": "2", **UNCACHED_DECODE},
)
SOME: Final = (REFERENCE, TWO_THREADS, SHM, TCP)
ALL: Final = (
    *SOME,
    *(Setup((*SINGLE, NO_CACHE, *budget(size)), (ways.cut_by(size),)) for size in (16, 512)),
    Setup(SINGLE, (ways.PARTIAL_HIT, ways.FULL_HIT)),
    Setup((*RELAY, NO_CACHE, *FEW_BLOCKS), (ways.PREEMPTED,)),
    Setup(RELAY, (ways.HIT_AND_HANDOFF,)),
)
_SHARED: Final = observed.shared_steps(WHOLE_PROMPTS)


def _counts_of(streams: Streams) -> tuple[Count, ...]:
    """What is counted of streams for which steps are begun ahead."""
    is_alone = streams.num_at_once == 1
    return (observed.beside_the_engine(DECODE), *([] if is_alone else [_SHARED]))


FOR_TOKENS: Final = (
    Setup((*SINGLE, NO_CACHE, *budget(WHOLE_PROMPTS)), (ways.REFERENCE, ways.for_tokens(STREAMS[-1], _SHARED))),
    Setup(
        (*SINGLE[:-1], "2", NO_CACHE, *budget(WHOLE_PROMPTS)),
        tuple(ways.for_tokens(streams, *_counts_of(streams)) for streams in STREAMS),
    ),
)
FOR_TOKENS_HANDED_OVER: Final = Setup(
    (*OWN_THREADS, NO_CACHE, "--transports", "shm"),
    (ways.for_tokens(STREAMS[-1], observed.handed_over("shm"), observed.beside_the_engine(DECODE)),),
    {"STAFFETTA_PREFILL_THREADS": "1", "STAFFETTA_DECODE_THREADS": "2"},
)


async def take_all(family: Family) -> list[Finding]:
    """Every way of every setup, one after the other. The first way of the first one is the reference."""
    expected: Sequence[AnswerBits] = ()
    findings: list[Finding] = []
    for setup in family.setups:
        async with _running(setup, family) as cluster:
            for way in setup.ways:
                finding = await _take(way, family, cluster, expected)
                expected = expected or finding.taken.outputs
                findings.append(finding)
    return findings


@contextlib.asynccontextmanager
async def _running(setup: Setup, family: Family) -> AsyncIterator[Cluster]:
    """The system of a setup, started and ended without keeping others on the event loop waiting."""
    cluster = Cluster(*setup.flags, *family.flags, environ=setup.environ, model=family.model)
    await asyncio.to_thread(cluster.__enter__)
    try:
        await asyncio.to_thread(cluster.wait_until_linked)
        yield cluster
    finally:
        await asyncio.to_thread(cluster.__exit__, *sys.exc_info())


def find(family: str, way: str, system: str, taken: Taken) -> Finding:
    """Compares what a way brought with what was due."""
    return Finding(family, way, system, taken, first_difference(taken.sent, taken.outputs, taken.expected))


async def _take(way: Way, family: Family, cluster: Cluster, expected: Sequence[AnswerBits]) -> Finding:
    started = time.monotonic()
    taken = await way.take(Site(cluster, family.requests, expected))
    settings = [f"{name}={value}" for name, value in cluster.environ.items()]
    system = " ".join([*settings, *cluster.flags])
    finding = find(family.name, way.name, system, taken)
    spent_s = time.monotonic() - started
    print(f"{family.name}, {way.name}, {spent_s:.1f} s: {finding.failures or 'same'}", file=sys.stderr, flush=True)
    return finding


def make_streaming_families(directory: Path, *, count: int, seed: int) -> list[Family]:
    """`count` streams that ask for tokens alone, in every arithmetic, to a model whose likeliest tokens have twins."""
    model = str(make_twins_model(directory / "twins", seed=seed))
    requests = draw_streams(count, seed=seed, vocab_size=TWINS.vocab_size)
    return [
        Family(
            f"twins, {name}",
            model,
            arithmetic.flags,
            (*FOR_TOKENS, FOR_TOKENS_HANDED_OVER) if name == "bfloat16" else FOR_TOKENS,
            requests,
        )
        for name, arithmetic in ARITHMETICS.items()
    ]


def take_here(family: Family, arithmetic: Arithmetic) -> list[Finding]:
    """The ways of streams in one process, which tells exactly what it did: this one."""
    found = []
    for here in ahead.take_here(Path(family.model), arithmetic, family.requests):
        finding = find(family.name, here.name, f"in one process, {here.threads} threads", here.taken)
        found.append(finding)
        print(f"{finding.family}, {finding.way}: {finding.failures or 'same'}", file=sys.stderr, flush=True)
    return found


def make_families(directory: Path, *, count: int, seed: int) -> list[Family]:
    """The models, written below `directory`, with their requests.

    `count` requests are shared out between float32 and bfloat16, and all go to INT8 as well; the embedded model's steps
    are larger, and it gets fewer.
    """
    odd = str(make_odd_model(directory / "odd", seed=seed))
    biased = str(make_biased_model(directory / "biased", seed=seed))
    requests = draw_requests(count, seed=seed, vocab_size=ODD.vocab_size)
    few = draw_requests(max(1, count // 10), seed=seed, vocab_size=open_tokenizer().get_vocab_size())
    float32, bfloat16, int8 = ("--dtype", "float32"), ("--dtype", "bfloat16"), ("--quantization", "int8")
    return [
        Family("odd, int8", odd, int8, ALL, requests),
        Family("odd, float32", odd, float32, ALL, requests[::2]),
        Family("odd with biases, bfloat16", biased, bfloat16, ALL, requests[1::2]),
        Family("embedded, float32", "demo", float32, SOME, few),
    ]


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=24, full=300)
    with tempfile.TemporaryDirectory() as directory:
        families = make_families(Path(directory), count=size.count, seed=size.seed)
        streaming = make_streaming_families(Path(directory), count=_NUM_STREAMS, seed=size.seed)
        # One at a time: while one compares, the connections of another would starve on the same event loop.
        taken = run(run_all([*families, *streaming], take_all, num_at_once=1))
        taken += [take_here(*pair) for pair in zip(streaming, ARITHMETICS.values(), strict=True)]
        findings = [finding for found in taken for finding in found]
    rows = [
        [
            found.family,
            found.way,
            found.system,
            len(found.taken.outputs),
            sum(output.num_tokens for output in found.taken.outputs),
            ", ".join(map(str, found.taken.conditions)),
            found.difference or "none",
        ]
        for found in findings
    ]
    headers = ("model", "way", "system", "requests", "tokens", "counted", "first difference")
    print_table(f"bits of tokens and log-probabilities beside the reference, seed {size.seed}", headers, rows)
    return verdict([failure for found in findings for failure in found.failures])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
