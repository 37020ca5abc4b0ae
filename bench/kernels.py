"""Each kernel at each shape as a share of what this machine can do: `python -m bench.kernels`.

Linear layers at one row and a few: bytes of weights read per second beside the read bandwidth. At many rows: operations
per second beside the GEMM rate of the same type. Attention over the paged pool: decode beside the bandwidth, prefill
beside the GEMM rate. Both sides are the best of many calls, in one run, the limits again after each model's. Weights
and KV are taken from several copies in turn, so that no cache holds them.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Final

import torch

from bench.limits import Limits, best_limits, best_s, limits_table, measure_limits
from bench.machine import describe_machine
from bench.result import write_result
from bench.shapes import SHAPES, ModelShape
from bench.table import format_table
from kernels.backend import Backend, Spans, WeightFormat, select
from kernels.reference import GROUP_INPUTS

MEASURED_SHAPES: Final = ("0.5b", "llama-8b-layer")
FEW_ROWS: Final = (1, 4, 16)
MANY_ROWS: Final = (256, 512, 2048)
CONTEXTS: Final = (256, 512, 2048, 4096)
BATCHES: Final = (1, 16)
_COLD_BYTES: Final = 2**28
"""What all copies together have at least: several times the largest cache."""
_BLOCK_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class KernelResult:
    """One kernel at one shape. `rate` is in 10⁹ bytes or operations per second, `limit` likewise; `share` is theirs."""

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
    """One way of storing weights: what is packed, bytes of one weight, and which GEMM rate is the limit."""

    name: str
    dtype: torch.dtype
    form: WeightFormat
    weight_bytes: float
    gemm: Callable[[Limits], float]


STORED: Final = (
    Stored("bf16", torch.bfloat16, WeightFormat.AS_GIVEN, 2, lambda limits: limits.gemm_bfloat16),
    Stored("fp32", torch.float32, WeightFormat.AS_GIVEN, 4, lambda limits: limits.gemm_float32),
    Stored("int8", torch.bfloat16, WeightFormat.INT8, 1, lambda limits: limits.gemm_int8),
    Stored("int8-weight", torch.bfloat16, WeightFormat.INT8_WEIGHT, 1, lambda limits: limits.gemm_bfloat16),
    Stored("int4", torch.bfloat16, WeightFormat.INT4, 0.5 + 4 / GROUP_INPUTS, lambda limits: limits.gemm_bfloat16),
)


@dataclass(frozen=True, slots=True)
class _Timing:
    """A measured call before it is set beside the limits."""

    shape: str
    kernel: str
    stored: Stored
    size: str
    seconds: float
    amount: float
    is_bound_by_memory: bool

    def beside(self, limits: Limits) -> KernelResult:
        limit = limits.read if self.is_bound_by_memory else self.stored.gemm(limits)
        unit = "GB/s" if self.is_bound_by_memory else "GOP/s"
        rate = self.amount / self.seconds / 1e9
        return KernelResult(self.shape, self.kernel, self.stored.name, self.size, self.seconds * 1e6, rate, unit, limit)


def measure_kernels(
    backend: Backend, *, names: Sequence[str], stored: Sequence[Stored], seconds: float, limits: Limits
) -> tuple[list[KernelResult], Limits]:
    """Measures every cell for about `seconds`; returns them beside the best limits of before, between and after."""
    timings: list[_Timing] = []
    for name in names:
        shape = SHAPES[name]
        for each in stored:
            for layer, (inputs, outputs) in shape.linears.items():
                timings += _linear(backend, name, layer, (inputs, outputs), each, seconds)
            if each.form is WeightFormat.AS_GIVEN:
                timings += _attention(backend, name, shape, each, seconds)
            limits = best_limits(limits, measure_limits(threads=limits.threads, seconds=seconds))
    return [timing.beside(limits) for timing in timings], limits


def _linear(
    backend: Backend, shape: str, layer: str, size: tuple[int, int], stored: Stored, seconds: float
) -> list[_Timing]:
    inputs, outputs = size
    weight_bytes = inputs * outputs * stored.weight_bytes
    copies = math.ceil(_COLD_BYTES / weight_bytes)
    weight = torch.randn(outputs, inputs).to(stored.dtype)
    layers = [backend.prepare_linear(weight, stored=stored.form) for _ in range(copies)]
    timings = []
    for rows in (*FEW_ROWS, *MANY_ROWS):
        x = torch.randn(rows, inputs).to(stored.dtype)
        took = best_s(_in_turn([partial(layer, x) for layer in layers]), seconds)
        is_few = rows in FEW_ROWS
        amount = weight_bytes if is_few else 2 * rows * inputs * outputs
        timings.append(_Timing(shape, layer, stored, f"M = {rows}", took, amount, is_few))
    return timings


def _attention(backend: Backend, name: str, shape: ModelShape, stored: Stored, seconds: float) -> list[_Timing]:
    timings = []
    heads, dim = shape.num_heads, shape.head_dim
    for context in CONTEXTS:
        for batch in BATCHES:
            kv_bytes = batch * context * 2 * shape.num_kv_heads * dim * stored.dtype.itemsize
            call = _attention_call(backend, shape, stored, batch=batch, queries=1, context=context)
            took = best_s(call, seconds)
            size = f"{batch} × 1 at {context}"
            timings.append(_Timing(name, "attention", stored, size, took, kv_bytes, True))
        call = _attention_call(backend, shape, stored, batch=1, queries=context, context=context)
        flops = 4 * heads * dim * (context * (context + 1) // 2)
        timings.append(_Timing(name, "attention", stored, f"prefill {context}", best_s(call, seconds), flops, False))
    return timings


def _attention_call(
    backend: Backend, shape: ModelShape, stored: Stored, *, batch: int, queries: int, context: int
) -> Callable[[], object]:
    """Attention of `batch` sequences of `context` tokens, their last `queries` asking, over as many layers of a pool as
    no cache holds."""
    blocks = context // _BLOCK_SIZE
    layer_bytes = batch * context * 2 * shape.num_kv_heads * shape.head_dim * stored.dtype.itemsize
    layers = -(-_COLD_BYTES // layer_bytes)
    # [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]
    pages = torch.randn(batch * blocks, shape.num_kv_heads, 1, 2, _BLOCK_SIZE, shape.head_dim).to(stored.dtype)
    pages = pages.repeat(1, 1, layers, 1, 1, 1)
    spans = Spans(
        query_starts=torch.arange(batch + 1) * queries,
        context_lens=torch.full((batch,), context),
        block_tables=torch.randperm(batch * blocks).view(batch, blocks),
    )
    query = torch.randn(batch * queries, shape.num_heads, shape.head_dim).to(stored.dtype)
    scale = shape.head_dim**-0.5
    return _in_turn(
        [partial(backend.paged_attention, query, pages, spans, layer=layer, scale=scale) for layer in range(layers)]
    )


def _in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Calls the next function at every call."""
    order = cycle(functions)
    return lambda: next(order)()


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
    results, limits = measure_kernels(
        backend,
        names=options.shapes,
        stored=stored,
        seconds=options.seconds,
        limits=measure_limits(threads=options.threads),
    )
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
