"""What Python costs in a step of sixteen decodes: `python -m tests.bars.step_overhead`. Bar: at most 0.3 ms.

Two runners take turns in one run: one whose model's definition runs operation by operation, and one that runs it as the
one call that is recorded from it. A step's Python is the processor time of `ModelRunner.run` on its thread, less that
inside the compiled functions; sampling is left out. Ends with 1 when the one call misses the bar.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.models.llama import Llama, tensor_shapes
from engine.request import SampledToken
from engine.runner import ModelRunner
from engine.step import Draw
from kernels.backend import Backend, Batch, Definition
from kernels.cpu.backend import CpuBackend
from kernels.rope import Rope
from tests.bars.report import print_table, verdict
from tests.engine.model_directory import make_sampling, make_slice

MAX_PYTHON_MS = 0.3
NUM_SEQUENCES = 16
CONTEXT = 192
BLOCK_SIZE = 16
NUM_BLOCKS = NUM_SEQUENCES * CONTEXT // BLOCK_SIZE


class Shape(NamedTuple):
    """A model of this bar: its configuration, and the type of its weights and pages."""

    config: ModelConfig
    dtype: torch.dtype


DEMO = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope=Rope(500_000.0),
    max_position_embeddings=2048,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    eos_token_ids=(2,),
)
HALF_BILLION = replace(
    DEMO,
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
)
SHAPES = {"demo": Shape(DEMO, torch.float32), "0.5B": Shape(HALF_BILLION, torch.bfloat16)}


class _TimedLibrary:
    """The kernels' library, with the time inside its functions added up: the thread's, and all that passes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.seconds = self.wall_seconds = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def timed(*arguments: object) -> object:
            wall, start = time.perf_counter(), time.thread_time()
            result = function(*arguments)
            self.seconds += time.thread_time() - start
            self.wall_seconds += time.perf_counter() - wall
            return result

        setattr(self, name, timed)
        return timed


class _OneByOne(CpuBackend):
    """The compiled kernels without the one call."""

    def compile_step(self, definition: Definition) -> Callable[[Batch, Tensor], tuple[Tensor, ...]]:
        return partial(definition, self)


class Times(NamedTuple):
    """Milliseconds of one step: inside the kernels, on the clock, and of Python, on its thread."""

    kernels: float
    python: float


def _make_runner(shape: Shape, backend: CpuBackend) -> ModelRunner:
    config = shape.config
    dtype: Literal["float32", "bfloat16"] = "float32" if shape.dtype is torch.float32 else "bfloat16"
    layout = config.kv_layout(block_size=BLOCK_SIZE, dtype=dtype, model_digest="random")
    # Layers share the numbers that they are packed from; what is packed is each layer's own, as in a model.
    tensors: dict[tuple[int, ...], Tensor] = {}
    weights = {
        name: tensors.setdefault(size, torch.full(size, 0.01, dtype=shape.dtype))
        for name, size in tensor_shapes(config).items()
    }
    pool = memoryview(bytearray(layout.page_bytes * NUM_BLOCKS))
    model = Llama.from_weights(config, weights, backend)
    return ModelRunner(config, model, backend, layout=layout, pool=pool, num_blocks=NUM_BLOCKS)


def _not_sampled(logits: Tensor, draws: Sequence[Draw], backend: Backend) -> list[tuple[SampledToken, ...]]:
    """In place of the sampler: its time is not measured here."""
    del logits, backend
    return [()] * len(draws)


def _measure(shape: Shape, *, threads: int, steps: int) -> tuple[list[Times], list[Times]]:
    """Times of the operations one by one, and of the one call."""
    backends = _OneByOne(threads=threads), CpuBackend(threads=threads)
    runners = [_make_runner(shape, backend) for backend in backends]
    libraries = [_TimedLibrary(backend.library) for backend in backends]
    for backend, library in zip(backends, libraries, strict=True):
        backend.library = cast(ctypes.CDLL, library)
    blocks = -(-CONTEXT // BLOCK_SIZE)
    tables = [list(range(index * blocks, (index + 1) * blocks)) for index in range(NUM_SEQUENCES)]
    token_ids, sampling = [5] * CONTEXT, make_sampling()
    slices = tuple(make_slice(token_ids, start=CONTEXT - 1, blocks=table, sampling=sampling) for table in tables)
    times: tuple[list[Times], list[Times]] = ([], [])
    with patch("engine.runner.sample", _not_sampled):
        for _ in range(steps):
            for runner, library, found in zip(runners, libraries, times, strict=True):
                library.seconds = library.wall_seconds = 0.0
                start = time.thread_time()
                runner.run(slices)
                python = time.thread_time() - start - library.seconds
                found.append(Times(library.wall_seconds * 1e3, python * 1e3))
    return times


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of each way")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    rows, failures = [], []
    for name in options.shapes:
        one_by_one, one_call = _measure(SHAPES[name], threads=options.threads, steps=options.steps)
        for way, times in (("one by one", one_by_one), ("one call", one_call)):
            kernels, python = (statistics.median(column) for column in zip(*times, strict=True))
            rows.append((name, way, kernels, python))
        if python > MAX_PYTHON_MS:
            failures.append(f"{name}: {python:.3f} ms of Python in a step, at most {MAX_PYTHON_MS}")
    title = f"Medians of {options.steps} steps of {NUM_SEQUENCES} decodes on {options.threads} threads, ms"
    print_table(title, ("model", "operations", "in kernels", "Python"), rows)
    return verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
