"""Compiled kernels against torch on the linear layers of the 0.5B shape: `python -m tests.bars.kernels_vs_torch`.

One table from one run: for every layer and number of rows the two take turns, and medians are compared. Torch computes
`F.linear` in the same dtype; for int8 the same layer as ours: rows quantized, `_int_mm`, scales. `int8-mm` sets our
whole int8 layer beside the bare product of integers that are there already: for information, it is not judged. Torch
has no CPU kernel for int8-weight and int4 that takes part: they are set beside our own bfloat16. A ratio above 1 means
that the format's own kernel is faster. Ends with 1 when a ratio is below what noise explains. On a machine that does
other work, `--clock cpu` compares the time that either spends on processors instead.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import WeightFormat
from kernels.cpu.backend import CpuBackend
from kernels.reference import quantize_rows
from tests.bars.turns import Clock, alternate

ROWS = (1, 4, 16, 64, 256, 512, 2048)
LAYERS = {"qkv": (1024, 4096), "o": (2048, 1024), "gate+up": (1024, 6144), "down": (3072, 1024), "head": (1024, 32_000)}
"""Inputs and outputs: hidden 1024, 16 heads and 8 KV heads of 128, intermediate 3072."""
HEAD_MAX_ROWS = 64
"""Only rows that sample reach the head."""


OnRows = Callable[[Tensor], Callable[[], object]]
"""From rows to what computes them; what it does with the rows beforehand is not measured."""


class Peer(NamedTuple):
    """One column: what our kernel is given, and what computes the same from the same weight."""

    dtype: torch.dtype
    stored: WeightFormat
    prepare: Callable[[CpuBackend, Tensor], OnRows]
    is_judged: bool = True


def _plain(_: CpuBackend, weight: Tensor) -> OnRows:
    return lambda x: partial(functional.linear, x, weight)


def _quantized(_: CpuBackend, weight: Tensor) -> OnRows:
    integers, scales = quantize_rows(weight)
    transposed = integers.T

    def linear(x: Tensor) -> Tensor:
        rows, row_scales = quantize_rows(x)
        return (torch._int_mm(rows, transposed).float() * row_scales[:, None] * scales).to(x.dtype)

    return lambda x: partial(linear, x)


def _int_mm(_: CpuBackend, weight: Tensor) -> OnRows:
    transposed = quantize_rows(weight)[0].T
    return lambda x: partial(torch._int_mm, quantize_rows(x)[0], transposed)


def _our_bf16(backend: CpuBackend, weight: Tensor) -> OnRows:
    layer = backend.prepare_linear(weight)
    return lambda x: partial(layer, x)


PEERS = {
    "bf16": Peer(torch.bfloat16, WeightFormat.AS_GIVEN, _plain),
    "fp32": Peer(torch.float32, WeightFormat.AS_GIVEN, _plain),
    "int8": Peer(torch.bfloat16, WeightFormat.INT8, _quantized),
    "int8-mm": Peer(torch.bfloat16, WeightFormat.INT8, _int_mm, is_judged=False),
    "int8-weight": Peer(torch.bfloat16, WeightFormat.INT8_WEIGHT, _our_bf16),
    "int4": Peer(torch.bfloat16, WeightFormat.INT4, _our_bf16),
}


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="per cell")
    parser.add_argument("--copies", type=int, default=8, help="weights taken in turn, so that caches do not hold them")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--least", type=float, default=0.9, help="ratio that every cell must reach")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    options = parser.parse_args()
    smallest = math.inf
    torch.set_num_threads(options.threads)
    backend = CpuBackend(threads=options.threads)
    setup = f"{backend.name}, torch {torch.__version__}, {options.threads} threads, {options.clock} clock"
    print(f"{setup}; ours µs / the other's µs = ratio")
    print(f"{'':20}" + "".join(f"{f'M = {rows}':>24}" for rows in ROWS))
    for peer_name in options.peers:
        for name in options.layers:
            compare = partial(alternate, seconds=options.seconds, clock=CLOCKS[options.clock])
            cells = _row(PEERS[peer_name], name, backend, copies=options.copies, compare=compare)
            if PEERS[peer_name].is_judged:
                smallest = min(smallest, *(theirs / ours for ours, theirs in cells))
            text = "".join(f"{ours * 1e6:8.0f} /{theirs * 1e6:8.0f} ={theirs / ours:5.2f}" for ours, theirs in cells)
            print(f"{peer_name:12}{name:8}{text}", flush=True)
    print(f"smallest judged ratio {smallest:.2f}, must be {options.least:.2f}")
    return 0 if smallest >= options.least else 1


def _row(
    peer: Peer,
    name: str,
    backend: CpuBackend,
    *,
    copies: int,
    compare: Callable[[Callable[[], object], Callable[[], object]], tuple[float, float]],
) -> list[tuple[float, float]]:
    """One layer: median seconds of ours and the other's for each number of rows."""
    inputs, outputs = LAYERS[name]
    weights = [torch.randn(outputs, inputs).to(peer.dtype) for _ in range(1 if name == "head" else copies)]
    layers = [backend.prepare_linear(weight, stored=peer.stored) for weight in weights]
    others = [peer.prepare(backend, weight) for weight in weights]
    cells = []
    for rows in ROWS:
        if name == "head" and rows > HEAD_MAX_ROWS:
            break
        x = torch.randn(rows, inputs).to(peer.dtype)
        ours = _in_turn([partial(layer, x) for layer in layers])
        theirs = _in_turn([on_rows(x) for on_rows in others])
        cells.append(compare(ours, theirs))
    return cells


def _in_turn(functions: list[Callable[[], object]]) -> Callable[[], object]:
    """Calls the next function at every call."""
    order = cycle(functions)
    return lambda: next(order)()


if __name__ == "__main__":
    sys.exit(main())
