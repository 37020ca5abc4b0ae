"""What a KV block's size changes, and the size of the pool's pages: the time of a decode step, and what blocks cost.

In one process, over a pool of random keys and values in huge pages and one in small ones, runners of every block size
take turns; each sequence's blocks lie scattered over all of the pool. Ratios are those of turns that followed one
another, above 1 where one is faster than the first. Beside that stands what a larger block costs: of a prompt that
another one begins with, the tokens after the last whole block are computed again, and a hand-off moves the whole of a
block that the prompt fills in part, at the mean over all lengths.
No bar: what it measured is why the defaults are what they are.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

import torch

from bench.make_checkpoint import CheckpointFormat
from bench.run import checkpoint
from engine.model_config import ModelConfig
from engine.request import RequestId, SamplingParams
from engine.runner import ModelRunner, load_runner
from engine.step import Draw, SequenceSlice
from kvtransfer.layout import BlockId
from kvtransfer.memory import HUGE_PAGE_BYTES, PoolMemory
from staffetta.cache_dir import AUTO, open_cache
from staffetta.digest_memo import remembered_digest
from tests.bars.report import print_table, spread
from worker.pool_pages import collapse_pages

BLOCK_SIZES: Final = (16, 32, 64)
_STEPS: Final = 4
"""In a turn, after one that is not counted: it wakes the threads."""
_LEAST_ROUNDS: Final = 3
_GREEDY: Final = SamplingParams(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    max_tokens=1,
    min_tokens=0,
    stop_token_ids=frozenset(),
    num_logprobs=None,
)


class Decodes(NamedTuple):
    """A step's streams: each computes the last position of its context."""

    streams: int
    context: int

    def __str__(self) -> str:
        return f"{self.streams} x {self.context:,}"


DECODES: Final = (Decodes(1, 544), Decodes(16, 176), Decodes(16, 2048))


class Pages(Enum):
    """What a pool's memory is made of."""

    HUGE = "huge"
    """As a worker's, where the kernel has them."""
    SMALL = "small"


@dataclass(frozen=True, slots=True)
class Contender:
    """A runner of one block size, over a pool that it shares with those of other sizes."""

    pages: Pages
    block_size: int
    runner: ModelRunner
    num_blocks: int
    page_bytes: int

    def slices(self, decodes: Decodes, *, seed: int) -> tuple[SequenceSlice, ...]:
        """The step: every stream's blocks are drawn from all of the pool."""
        blocks = -(-decodes.context // self.block_size)
        drawn = random.Random(seed).sample(range(self.num_blocks), decodes.streams * blocks)
        block_ids = tuple(map(BlockId, drawn))
        return tuple(
            SequenceSlice(
                RequestId(f"{stream:032x}"),
                (stream,),
                decodes.context - 1,
                block_ids[stream * blocks : (stream + 1) * blocks],
                Draw(_GREEDY, 0),
            )
            for stream in range(decodes.streams)
        )


def make_contenders(
    model: Path, *, threads: int, num_positions: int, block_sizes: Sequence[int] = BLOCK_SIZES
) -> list[Contender]:
    """Runners over a pool of each kind for `num_positions` tokens, a multiple of every size, in bfloat16."""
    config, cache = ModelConfig.from_directory(model), open_cache(AUTO, model=model)
    digest = remembered_digest(model, cache)
    layouts = [config.kv_layout(block_size=size, dtype="bfloat16", model_digest=digest) for size in block_sizes]
    contenders = []
    for pages in Pages:
        pool = _random_pool(num_positions // block_sizes[0], layouts[0].page_bytes, pages)
        for size, layout in zip(block_sizes, layouts, strict=True):
            num_blocks = num_positions // size
            runner = load_runner(
                model, config, layout, pool=pool, num_blocks=num_blocks, threads=threads, device="cpu", cache=cache
            )
            contenders.append(Contender(pages, size, runner, num_blocks, layout.page_bytes))
    return contenders


def _random_pool(num_blocks: int, page_bytes: int, pages: Pages) -> memoryview:
    """A worker's kind of memory, full of keys and values that a model could have made, whatever the layout."""
    pool = PoolMemory(num_blocks, page_bytes).buffer
    part = torch.empty(HUGE_PAGE_BYTES // 2, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))
    for begin in range(0, len(pool), HUGE_PAGE_BYTES):
        piece = pool[begin : begin + HUGE_PAGE_BYTES]
        with suppress(OSError):  # a kernel without, or the pool's end
            if pages is Pages.HUGE:
                collapse_pages(piece)
        values = torch.frombuffer(piece, dtype=torch.bfloat16)
        values.copy_(part[: len(values)])
    return pool


def measure(contenders: Sequence[Contender], decodes: Decodes, *, seconds: float) -> list[list[float]]:
    """Milliseconds of a step in each turn, for each contender: a turn's median. Who begins a round changes."""
    steps = [contender.slices(decodes, seed=1) for contender in contenders]
    order = list(range(len(contenders)))
    turns: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns[0]) < _LEAST_ROUNDS:
        for index in order:
            turns[index].append(_take_turn(contenders[index].runner, steps[index]))
        order.append(order.pop(0))
    return turns


def _take_turn(runner: ModelRunner, slices: tuple[SequenceSlice, ...]) -> float:
    times = []
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        runner.run(slices)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * 1e3


def step_rows(
    contenders: Sequence[Contender], decodes: Decodes, turns: Sequence[Sequence[float]]
) -> list[list[object]]:
    """A row for each contender: the step's milliseconds, and how many times as fast it is as the first."""
    return [
        [
            str(decodes),
            contender.pages.value,
            contender.block_size,
            spread(own, digits=2),
            spread([base / ms for base, ms in zip(turns[0], own, strict=True)], digits=3),
        ]
        for contender, own in zip(contenders, turns, strict=True)
    ]


def cost_row(contender: Contender) -> list[object]:
    """What is lost with a block that a prompt ends in, at the mean over all lengths."""
    lost = (contender.block_size - 1) / 2
    return [contender.block_size, lost, lost * contender.page_bytes / contender.block_size / 2**20]


def main(argv: Sequence[str]) -> int:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="directory; default: the bench's W8A8 and bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each step's turns; default 10")
    options = parser.parse_args(argv)
    models = options.model or [checkpoint("0.5b", stored) for stored in (CheckpointFormat.W8A8, CheckpointFormat.BF16)]
    most = max(decodes.streams * decodes.context for decodes in DECODES)
    for model in models:
        contenders = make_contenders(model, threads=options.threads, num_positions=most)
        rows = [
            row
            for decodes in DECODES
            for row in step_rows(contenders, decodes, measure(contenders, decodes, seconds=options.seconds))
        ]
        print_table(f"{model.name}: a decode step", ("streams", "pages", "block", "ms", "x the first"), rows)
        headers = ("block", "tokens computed again after a hit", "MiB moved for nothing in a hand-off")
        print_table("the last block of a prompt", headers, list(map(cost_row, contenders[: len(BLOCK_SIZES)])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
