"""What this machine can do at best, measured through torch: `python -m bench.limits`.

The best of many short runs, because a limit is what nothing exceeds; on a shared host every other figure only tells of
the neighbours. Rates are per second of wall time, in 10⁹ bytes or operations, a fused multiply-add counting as two.
Reading is measured on memory in huge pages, as packed weights and KV pools are: with small ones, walking page tables
takes a seventh of two threads' bandwidth. A bare loop of 64-byte loads reads 6 % more than the sums used here.
"""

import argparse
import dataclasses
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch

from bench.machine import describe_machine
from bench.table import format_table
from bench.workload import W1

READ_BYTES: Final = 2**30
"""Far more than any cache holds."""
_HUGE_PAGE: Final = 2**21
_GEMM_SIZE: Final = 2048
_BETWEEN_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """One machine's limits, with `threads` threads where nothing else is said."""

    threads: int
    read_one_thread: float
    """Bytes read from memory by one thread, 10⁹ per second."""
    read: float
    copy: float
    """Bytes copied, each counted once."""
    gemm_float32: float
    gemm_bfloat16: float
    gemm_int8: float


_RATES: Final = tuple(field.name for field in dataclasses.fields(Limits) if field.name != "threads")


def measure_limits(*, threads: int, seconds: float = 0.5, memory: torch.Tensor | None = None) -> Limits:
    """Measures everything, each probe for about `seconds`. Leaves torch's number of threads at `threads`.

    `memory` is what `huge_pages` gave, for whoever measures again and again: to get it takes longer than to read it.
    """
    words = huge_pages(READ_BYTES) if memory is None else memory
    source, destination = words.chunk(2)
    torch.set_num_threads(1)
    read_one_thread = read_rate(words, seconds)
    torch.set_num_threads(threads)
    read = read_rate(words, seconds)
    copy = source.nbytes / best_s(partial(destination.copy_, source), seconds) / 1e9
    return Limits(
        threads=threads,
        read_one_thread=read_one_thread,
        read=max(read, read_one_thread),
        copy=copy,
        gemm_float32=gemm_rate(torch.float32, seconds),
        gemm_bfloat16=gemm_rate(torch.bfloat16, seconds),
        gemm_int8=int8_rate(seconds),
    )


class LimitProbe:
    """Measures the limits between the rounds of a run: on either side of every round of W1, whose bars refer to them,
    and once before any other workload, so that a machine that drifts is seen to. `samples` are by workload, in order.
    """

    def __init__(self, *, threads: int) -> None:
        self.samples: dict[str, list[Limits]] = {}
        self._threads = threads
        self._memory = huge_pages(READ_BYTES)

    def again(self, workload: str) -> None:
        """Before or after a round of `workload`; takes about two seconds, in which nothing else may run."""
        samples = self.samples.setdefault(workload, [])
        if workload == W1.name or not samples:
            samples.append(measure_limits(threads=self._threads, seconds=_BETWEEN_S, memory=self._memory))

    def of_rounds(self) -> list[Limits]:
        """What could be reached in each round of W1: the best of the two samples around it."""
        return [best_limits(before, after) for before, after in pairwise(self.samples.get(W1.name, ()))]


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Memory to read, written once, in huge pages where the system gives them: int64, [num_bytes / 8]."""
    # Private: shared memory, which is mmap's default, has huge pages only where the system allows them for files too.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages: slower, not wrong
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64, count=num_bytes // 8).fill_(1)


def best_limits(first: Limits, second: Limits) -> Limits:
    """The higher of each: what was reached once can be reached."""
    best = {name: max(getattr(first, name), getattr(second, name)) for name in _RATES}
    return dataclasses.replace(first, **best)


def best_s(function: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit into `seconds`, three at least, after one that is not counted."""
    function()
    shortest, count = float("inf"), 0
    end = time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - started)
        count += 1
    return shortest


def read_rate(words: torch.Tensor, seconds: float) -> float:
    """Two sums, of integers and of floats, that do next to nothing with what they read; whichever reads faster."""
    took = min(best_s(part.sum, seconds / 2) for part in (words, words.view(torch.float32)))
    return words.nbytes / took / 1e9


def gemm_rate(dtype: torch.dtype, seconds: float) -> float:
    """Of a square product, larger than any cache."""
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(2))
    return 2 * _GEMM_SIZE**3 / best_s(lambda: a @ b, seconds) / 1e9


def int8_rate(seconds: float) -> float:
    """Both layouts of the second factor; torch is fast in one of them, depending on its build."""
    a, b = (torch.randint(-127, 128, (_GEMM_SIZE, _GEMM_SIZE), dtype=torch.int8) for _ in range(2))
    took = min(best_s(partial(torch._int_mm, a, second), seconds / 2) for second in (b, b.T))
    return 2 * _GEMM_SIZE**3 / took / 1e9


_UNITS: Final = {
    "read_one_thread": ("read, 1 thread", "GB/s"),
    "read": ("read, {} threads", "GB/s"),
    "copy": ("copy, {} threads", "GB/s"),
    "gemm_float32": ("GEMM float32, {} threads", "GFLOP/s"),
    "gemm_bfloat16": ("GEMM bfloat16, {} threads", "GFLOP/s"),
    "gemm_int8": ("GEMM int8, {} threads", "GOP/s"),
}


def limits_table(samples: Sequence[Limits]) -> str:
    """The limits for people: the median of `samples`, at least one, and the lowest and highest where there are more."""
    rows = []
    for name, (title, unit) in _UNITS.items():
        rates = [getattr(each, name) for each in samples]
        ends = (min(rates), max(rates)) if len(rates) > 1 else (None, None)
        rows.append((title.format(samples[0].threads), statistics.median(rates), *ends, unit))
    return format_table(("limit", "rate", "lowest", "highest", "unit"), rows)


def main(argv: Sequence[str]) -> int:
    """Prints the machine and its limits."""
    from bench.result import write_result

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--threads", type=int, default=describe_machine().num_cores)
    parser.add_argument("--seconds", type=float, default=1.0, help="per probe")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    options = parser.parse_args(argv)
    limits = measure_limits(threads=options.threads, seconds=options.seconds)
    print(limits_table([limits]))
    if options.output:
        write_result(options.output, {"limits": dataclasses.asdict(limits)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
