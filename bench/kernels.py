"""Each kernel at each shape as a share of what this machine can do: `python -m bench.kernels`.

Linear layers at one row and a few: bytes of weights read per second beside the read bandwidth. At many rows: operations
per second beside the GEMM rate of the same type. Attention over the paged pool: decode beside the bandwidth, prefill
beside the GEMM rate. A kernel is called as a model's step calls it, see `bench.kernel_steps`. Before and after every
turn at a cell its limit is measured again, because on a shared host it moves by half within seconds.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch

from bench.kernel_steps import KernelStep, attention_step, linear_steps
from bench.limits import (
    READ_BYTES,
    best_s,
    gemm_rate,
    huge_pages,
    int8_rate,
    limits_table,
    measure_limits,
    read_rate,
)
from bench.machine import describe_machine
from bench.result import write_result
from bench.shapes import SHAPES
from bench.table import format_table
from kernels.backend import Backend, WeightFormat, select
from kernels.reference import GROUP_INPUTS

MEASURED_SHAPES: Final = ("0.5b", "llama-8b-layer")
FEW_ROWS: Final = (1, 4, 16)
MANY_ROWS: Final = (256, 512, 2048)
CONTEXTS: Final = (256, 512, 2048, 4096)
BATCHES: Final = (1, 16)
_TURNS: Final = 3
_PROBE_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class KernelResult:
    """One kernel at one shape. `rate` is in 10⁹ bytes or operations per second, `limit` likewise; `share` is theirs.

    They are of the turn whose share is the median.
    """

    shape: str
    kernel: str
    stored: str
    size: str
    microseconds: float
    rate: float
    unit: str
    limit: float

    @property
    def share(self) -> float:
        """How much of the limit is reached."""
        return self.rate / self.limit


@dataclass(frozen=True, slots=True)
class Stored:
    """One way of storing weights: what is packed, bytes of one weight, and what measures the GEMM rate that is the
    limit, given seconds."""

    name: str
    dtype: torch.dtype
    form: WeightFormat
    weight_bytes: float
    gemm_rate: Callable[[float], float]


_BF16_RATE: Final = partial(gemm_rate, torch.bfloat16)
STORED: Final = (
    Stored("bf16", torch.bfloat16, WeightFormat.AS_GIVEN, 2, _BF16_RATE),
    Stored("fp32", torch.float32, WeightFormat.AS_GIVEN, 4, partial(gemm_rate, torch.float32)),
    Stored("int8", torch.bfloat16, WeightFormat.INT8, 1, int8_rate),
    Stored("int8-weight", torch.bfloat16, WeightFormat.INT8_WEIGHT, 1, _BF16_RATE),
    Stored("int4", torch.bfloat16, WeightFormat.INT4, 0.5 + 4 / GROUP_INPUTS, _BF16_RATE),
)


@dataclass(frozen=True, slots=True)
class _Cell:
    """What is measured: `amount` is what one call of the step reads or computes."""

    shape: str
    kernel: str
    stored: Stored
    size: str
    step: KernelStep
    amount: float
    is_bound_by_memory: bool

    def measure(self, read: Callable[[float], float], seconds: float) -> KernelResult:
        """In turns with its limit. `read` measures the read bandwidth."""
        measure_limit = read if self.is_bound_by_memory else self.stored.gemm_rate
        limits, durations = [measure_limit(_PROBE_S)], []
        for _ in range(_TURNS):
            durations.append(best_s(self.step.run, seconds / _TURNS) / self.step.num_calls)
            limits.append(measure_limit(_PROBE_S))
        unit = "GB/s" if self.is_bound_by_memory else "GOP/s"
        turns = [
            KernelResult(
                self.shape,
                self.kernel,
                self.stored.name,
                self.size,
                microseconds=duration * 1e6,
                rate=self.amount / duration / 1e9,
                unit=unit,
                limit=max(around),
            )
            for duration, around in zip(durations, pairwise(limits), strict=True)
        ]
        return sorted(turns, key=lambda turn: turn.share)[_TURNS // 2]


def measure_kernels(
    backend: Backend, *, names: Sequence[str], stored: Sequence[Stored], seconds: float
) -> list[KernelResult]:
    """Measures every cell for about `seconds`, and its limit in between, with as many threads as torch has."""
    read = partial(read_rate, huge_pages(READ_BYTES))
    results: list[KernelResult] = []
    for name in names:
        for each in stored:
            results += [cell.measure(read, seconds) for cell in _linear_cells(backend, name, each)]
            if each.form is WeightFormat.AS_GIVEN:
                results += [cell.measure(read, seconds) for cell in _attention_cells(backend, name, each)]
    return results


def _linear_cells(backend: Backend, name: str, stored: Stored) -> Iterator[_Cell]:
    for layer, (inputs, outputs) in SHAPES[name].linears.items():
        weight, weight_bytes = torch.randn(outputs, inputs).to(stored.dtype), inputs * outputs * stored.weight_bytes
        rows = (*FEW_ROWS, *MANY_ROWS)
        steps = linear_steps(backend, weight, stored.form, weight_bytes=weight_bytes, rows=rows)
        for num_rows in rows:
            is_few = num_rows in FEW_ROWS
            amount = weight_bytes if is_few else 2 * num_rows * inputs * outputs
            yield _Cell(name, layer, stored, f"M = {num_rows}", steps[num_rows], amount, is_few)


def _attention_cells(backend: Backend, name: str, stored: Stored) -> Iterator[_Cell]:
    shape = SHAPES[name]
    cell = partial(_Cell, name, "attention", stored)
    for context in CONTEXTS:
        for batch in BATCHES:
            step = attention_step(backend, shape, stored.dtype, batch=batch, queries=1, context=context)
            kv_bytes = batch * context * 2 * shape.num_kv_heads * shape.head_dim * stored.dtype.itemsize
            yield cell(f"{batch} × 1 at {context}", step, kv_bytes, is_bound_by_memory=True)
        step = attention_step(backend, shape, stored.dtype, batch=1, queries=context, context=context)
        flops = 4 * shape.num_heads * shape.head_dim * (context * (context + 1) // 2)
        yield cell(f"prefill {context}", step, flops, is_bound_by_memory=False)


def kernels_table(results: Sequence[KernelResult]) -> str:
    """The results for people."""
    headers = ("shape", "weights", "kernel", "size", "µs", "rate", "unit", "limit", "share")
    rows = [
        (
            each.shape,
            each.stored,
            each.kernel,
            each.size,
            each.microseconds,
            each.rate,
            each.unit,
            each.limit,
            each.share,
        )
        for each in results
    ]
    return format_table(headers, rows)


def main(argv: Sequence[str]) -> int:
    """Prints limits and kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--threads", type=int, default=describe_machine().num_cores)
    parser.add_argument("--seconds", type=float, default=0.2, help="per cell")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(MEASURED_SHAPES), metavar="SHAPE")
    parser.add_argument("--stored", nargs="+", choices=[each.name for each in STORED], default=["bf16", "int8"])
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    options = parser.parse_args(argv)
    backend = select("cpu", threads=options.threads)
    stored = [each for each in STORED if each.name in options.stored]
    limits = measure_limits(threads=options.threads)
    results = measure_kernels(backend, names=options.shapes, stored=stored, seconds=options.seconds)
    print(f"{backend.name}\n\n{limits_table([limits])}\n\n{kernels_table(results)}")
    if options.output:
        content = {"limits": dataclasses.asdict(limits), "kernels": [result_fields(result) for result in results]}
        write_result(options.output, content)
    return 0


def result_fields(result: KernelResult) -> dict[str, object]:
    """One result as JSON has it."""
    return {**dataclasses.asdict(result), "share": result.share}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
