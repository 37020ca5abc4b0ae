"""Compiled sampling against one pass over the logits: `python -m tests.bars.sampling`.

Thirty-two sequences draw from a vocabulary of 151,936, each by `engine.sampler.sample`, so that what Python does is in
the figures. A pass is the time in which the machine, at the bandwidth measured beside, reads the logits once. Logits
are taken in turn from several copies, so that no cache holds them. Flat rows are normal numbers, of which top-p 0.9
keeps tens of thousands; peaked ones are three times as wide, as a model's are. What is penalised is strewn over the
vocabulary. All kinds of draw, and the reading, take turns, so that none has the machine when it is quieter than for
the others; passes are counted for the shortest of many runs, because the bandwidth too is the best that was seen, and
the median is beside it. With `--specification`, so is plain numpy, once. Ends with 1 when a row of the table needs
more passes than `--most`.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, product

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampler import sample
from engine.step import Draw
from kernels.backend import Backend, select
from tests.bars.report import print_table

NUM_ROWS, VOCAB_SIZE, NUM_COPIES = 32, 151_936, 4
NUM_SEEN = (800, 200)
"""Tokens of prompt and output that penalties count."""
_READING = ("reading",)
GREEDY = SamplingParams(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=1,
    max_tokens=1024,
    min_tokens=0,
    stop_token_ids=frozenset(),
    num_logprobs=None,
)
_MODES: dict[str, dict[str, float | int]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "greedy, 5 logprobs": {"num_logprobs": 5},
}


def _draws(mode: str) -> list[Draw]:
    sampling = SamplingParams(**({name: getattr(GREEDY, name) for name in GREEDY.__slots__} | _MODES[mode]))
    num_prompt, num_output = NUM_SEEN if sampling.is_penalised else (0, 0)
    dice = random.Random(1)
    return [
        Draw(
            sampling,
            output_index=100 + row,
            prompt_token_ids=tuple(sorted(dice.sample(range(VOCAB_SIZE), num_prompt))),
            output_token_ids=tuple(dice.choices(range(VOCAB_SIZE), k=num_output)),
        )
        for row in range(NUM_ROWS)
    ]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _sampling(copies: list[Tensor], mode: str, backend: Backend) -> Callable[[], object]:
    """Draws from the next copy with every call."""
    draws, order = _draws(mode), cycle(copies)
    return lambda: sample(next(order), draws, backend)


def _times_s(
    functions: dict[tuple[str, ...], Callable[[], object]], repeats: int
) -> dict[tuple[str, ...], list[float]]:
    """Of each function, which take turns."""
    times: dict[tuple[str, ...], list[float]] = {key: [] for key in functions}
    for _ in range(repeats):
        for key, function in functions.items():
            times[key].append(_seconds(function))
    return times


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--specification", action="store_true", help="time the plain numpy too")
    parser.add_argument("--most", type=float, default=4.0, help="passes that every row may take")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend, specification = select("cpu", threads=options.threads), select("cpu-reference")
    generator = torch.Generator().manual_seed(1)
    flat = [torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator) for _ in range(NUM_COPIES)]
    logits = {"flat": flat, "peaked": [rows * 3 for rows in flat]}
    large = torch.ones(64 << 20)
    lines = [*product(logits, _MODES)]
    times = _times_s(
        {_READING: large.sum, **{line: _sampling(logits[line[0]], line[1], backend) for line in lines}}, options.repeats
    )
    bandwidth = large.nbytes / min(times[_READING])
    pass_s = 4 * NUM_ROWS * VOCAB_SIZE / bandwidth
    rows = []
    for shape, mode in lines:
        best, median = min(times[shape, mode]), statistics.median(times[shape, mode])
        plain = _seconds(_sampling(logits[shape], mode, specification)) * 1e3 if options.specification else "-"
        rows.append((shape, mode, best * 1e3, median * 1e3, best / pass_s, plain))
    most = max(row[4] for row in rows)
    print(f"{backend.name}, {options.threads} threads")
    print(f"reads {bandwidth / 1e9:.1f} GB/s: a pass takes {pass_s * 1e3:.2f} ms")
    print_table(
        f"{NUM_ROWS} rows of {VOCAB_SIZE:,}", ("logits", "mode", "ms", "median ms", "passes", "specification ms"), rows
    )
    print(f"\nmost passes {most:.2f}, may be {options.most:.2f}")
    return 0 if most <= options.most else 1


if __name__ == "__main__":
    sys.exit(main())
