"""Compiled paged attention against torch on contiguous keys and values: `python -m tests.bars.attention_vs_torch`.

One table from one run: for every shape the two take turns, and medians are compared; a ratio above 1 means that ours is
faster. Ours walks shuffled blocks of a pool; torch is spared that, and takes the fastest of its own ways, named in the
table: `gqa` is `enable_gqa`, `expanded` has the KV heads repeated beforehand, `rows` gives the heads of a group as
query rows, which decode allows. Decode reads each time what no cache holds: another layer of a pool larger than the
caches. The last column is, for decode, bytes of keys and values per second as a share of the machine's read bandwidth;
for prefill, operations per second as a share of torch's matrix product in float32. Ends with 1 when a ratio is below
what noise explains.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.backend import Spans
from kernels.cpu.backend import CpuBackend
from tests.bars.turns import alternate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
COLD_BYTES = 96 << 20
"""Read by each side between two visits of a layer: three times the last cache."""
MAX_BYTES = 2 << 30
"""Shapes whose keys and values take more are left out."""


class Shape(NamedTuple):
    """What is asked: the last `queries` positions of each of `batch` contexts."""

    batch: int
    queries: int
    context: int

    def __str__(self) -> str:
        if self.queries == 1:
            return f"decode {self.batch} x {self.context}"
        return f"prefill {self.queries}" if self.queries == self.context else f"chunk {self.queries} of {self.context}"


class Heads(NamedTuple):
    """Query heads, KV heads and their size."""

    query: int
    kv: int
    dim: int


class Case(NamedTuple):
    """One row of the table."""

    shape: Shape
    heads: Heads
    dtype_name: str
    block_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return DTYPES[self.dtype_name]

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one layer."""
        return self.shape.batch * self.shape.context * self.heads.kv * self.heads.dim * 2 * self.dtype.itemsize

    @property
    def num_layers(self) -> int:
        """Prefill finds what it attends to in the caches, decode does not."""
        return max(2, math.ceil(COLD_BYTES / self.kv_bytes)) if self.shape.queries == 1 else 2

    @property
    def operations(self) -> int:
        """Multiplications and additions of visible pairs: two products."""
        batch, queries, context = self.shape
        visible = batch * (queries * context - queries * (queries - 1) // 2)
        return 4 * self.heads.query * self.heads.dim * visible


DECODES = tuple(Shape(batch, 1, context) for batch in (1, 16) for context in (128, 512, 2048, 8192))
PREFILLS = (Shape(1, 128, 128), Shape(1, 512, 512), Shape(1, 2048, 2048), Shape(1, 128, 2048), Shape(1, 512, 2048))
SHAPES = DECODES + PREFILLS
FEW_SHAPES = tuple(SHAPES[i] for i in (1, 3, 5, 6, 8, 9, 10, 11))
GROUPS = ((16, 8), (32, 8), (8, 1), (16, 16))
DIMS = (64, 80, 96, 128, 256)
COMMON = Heads(16, 8, 128)
FEW_HEADS = (Heads(32, 8, 64), Heads(16, 16, 80), Heads(16, 8, 96), Heads(8, 1, 256))
BLOCK_SIZES = (16, 32, 64)


def _cases(*, is_full: bool) -> Iterator[Case]:
    """Everything, or every shape with common heads, other heads with some shapes, and other block sizes once."""
    if is_full:
        for dtype, (query, kv), dim in itertools.product(DTYPES, GROUPS, DIMS):
            for shape, block_size in itertools.product(SHAPES, BLOCK_SIZES):
                yield Case(shape, Heads(query, kv, dim), dtype, block_size)
        return
    for dtype, shape in itertools.product(("bf16", "fp32"), SHAPES):
        yield Case(shape, COMMON, dtype, 16)
    for heads, dtype, shape in itertools.product(FEW_HEADS, ("bf16", "fp32"), FEW_SHAPES):
        yield Case(shape, heads, dtype, 16)
    for shape, block_size in itertools.product(FEW_SHAPES, (32, 64)):
        yield Case(shape, COMMON, "bf16", block_size)
    for shape in FEW_SHAPES:
        yield Case(shape, COMMON, "fp16", 16)


def _ours(case: Case, backend: CpuBackend) -> Callable[[], object]:
    """Attends over the layers of a pool in turn; each sequence's blocks lie scattered."""
    batch, queries, context = case.shape
    blocks = math.ceil(context / case.block_size)
    pages = torch.empty(
        batch * blocks, case.heads.kv, case.num_layers, 2, case.block_size, case.heads.dim, dtype=case.dtype
    )
    pages.normal_()
    tables = torch.randperm(batch * blocks).view(batch, blocks)
    spans = Spans(torch.arange(batch + 1) * queries, torch.full((batch,), context), tables)
    query = torch.randn(batch * queries, case.heads.query, case.heads.dim).to(case.dtype)
    attend = partial(backend.paged_attention, query, pages, spans, scale=case.heads.dim**-0.5)
    layers = cycle(range(case.num_layers))
    return lambda: attend(layer=next(layers))


def _torch_ways(case: Case) -> dict[str, Callable[[], object]]:
    """What torch can be given for the same, as functions that attend over contiguous layers in turn."""
    batch, queries, context = case.shape
    query_heads, kv_heads, dim = case.heads
    group = query_heads // kv_heads
    stored = [torch.empty(2, batch, kv_heads, context, dim, dtype=case.dtype).normal_() for _ in range(case.num_layers)]
    query = torch.randn(batch, query_heads, queries, dim).to(case.dtype)
    mask = None
    if 1 < queries < context:
        seen = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
        mask = torch.zeros(queries, context, dtype=case.dtype).masked_fill(~seen, -math.inf)
    attend = partial(scaled_dot_product_attention, attn_mask=mask, is_causal=1 < queries == context)

    def over(layers: Sequence[Tensor], query: Tensor, *, enable_gqa: bool) -> Callable[[], object]:
        order = cycle(layers)

        def call() -> Tensor:
            keys, values = next(order)
            return attend(query, keys, values, enable_gqa=enable_gqa)

        return call

    if group == 1:
        return {"plain": over(stored, query, enable_gqa=False)}
    ways = {"gqa": over(stored, query, enable_gqa=True)}
    if queries == 1:
        ways["rows"] = over(stored, query.view(batch, kv_heads, group, dim), enable_gqa=False)
    if case.kv_bytes * group * case.num_layers <= MAX_BYTES:
        repeated = [layer.repeat_interleave(group, dim=2) for layer in stored]
        ways["expanded"] = over(repeated, query, enable_gqa=False)
    return ways


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _fastest(ways: dict[str, Callable[[], object]]) -> str:
    """The way with the smallest of a few times."""
    best = {name: min(_seconds(way) for _ in range(4)) for name, way in ways.items()}
    return min(best, key=best.__getitem__)


class Limits(NamedTuple):
    """What the machine can do, by torch: bytes read and float32 operations, per second."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls) -> "Limits":
        """The best of several."""
        large, square = torch.ones(64 << 20), torch.randn(2048, 2048)
        bandwidth = large.nbytes / min(_seconds(large.sum) for _ in range(5))
        return cls(bandwidth, 2 * 2048**3 / min(_seconds(lambda: square @ square) for _ in range(5)))


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every combination: hours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="per row")
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--least", type=float, default=0.9, help="ratio that every row must reach")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend, limits = CpuBackend(threads=options.threads), Limits.measure()
    print(f"{backend.name}, torch {torch.__version__}, {options.threads} threads")
    print(f"reads {limits.bandwidth / 1e9:.1f} GB/s, float32 products {limits.rate / 1e9:.0f} GFLOP/s")
    print(f"{'':49}{'ours µs':>9}{'torch µs':>10}{'ratio':>7}  {'torch way':10}{'of the limit':>12}")
    ratios = []
    for case in _cases(is_full=options.full):
        name = f"{case.dtype_name}  {case.shape!s:18}{case.heads.query}/{case.heads.kv} of {case.heads.dim:<5}"
        name += f"blocks of {case.block_size}"
        if options.only not in name or case.kv_bytes > MAX_BYTES:
            continue
        ways = _torch_ways(case)
        way = _fastest(ways)
        ours, theirs = alternate(_ours(case, backend), ways[way], seconds=options.seconds)
        ratios.append(theirs / ours)
        share = case.kv_bytes / ours / limits.bandwidth
        if case.shape.queries > 1:
            share = case.operations / ours / limits.rate
        print(f"{name:49}{ours * 1e6:9.0f}{theirs * 1e6:10.0f}{theirs / ours:7.2f}  {way:10}{share:12.0%}", flush=True)
    print(f"smallest ratio {min(ratios):.2f}, must be {options.least:.2f}")
    return 0 if min(ratios) >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
