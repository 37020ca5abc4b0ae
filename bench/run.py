"""`make bench`: our own system on this machine, whole: limits, kernels, and W1 to W4 colocated and handed over.

1. The checkpoint is written, once. 2. The machine's limits are measured. 3. The kernels (`bench.kernels`). 4. For each
way of storing weights, one server that prefills where it decodes and one that hands over alternate over the workloads.
5. Tables with the limits in them, and one JSON file. `--quick` measures W1 and W2 once and takes under two minutes.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from bench.kernels import MEASURED_SHAPES, STORED, KernelResult, kernels_table, measure_kernels, result_fields
from bench.limits import Limits, best_limits, limits_table, measure_limits
from bench.local_server import LocalServer
from bench.machine import describe_machine
from bench.make_checkpoint import CheckpointFormat, make_checkpoint
from bench.measure import Measurement, Observer, PhaseResult, measurement_table
from bench.record import medians
from bench.result import write_result
from bench.serve import add_plan_arguments, make_plan, measure_now, tell
from bench.shapes import SHAPES, ModelShape
from bench.table import format_table
from bench.workload import W1, W2, WORKLOADS
from kernels.backend import select

BUILD: Final = Path("build/bench")
RESULTS: Final = Path("bench/results")
_SEED: Final = 1
_QUICK_WORKLOADS: Final = (W1.name, W2.name)
_PROBE_S: Final = 0.2
_BETWEEN_S: Final = 0.05
_KERNEL_WEIGHTS: Final = ("bf16", "int8")


class Weights(Enum):
    """How the served weights are stored; the value is the name on the command line."""

    BF16 = "bf16"
    INT8 = "int8"
    """The bfloat16 checkpoint, quantized at load."""
    W8A8 = "w8a8"
    """A checkpoint that holds integers."""

    @property
    def checkpoint(self) -> CheckpointFormat:
        """What is on disk."""
        return CheckpointFormat.W8A8 if self is Weights.W8A8 else CheckpointFormat.BF16

    @property
    def flags(self) -> tuple[str, ...]:
        """What `staffetta serve` is told."""
        return ("--quantization", "int8") if self is Weights.INT8 else ()


@dataclass(frozen=True, slots=True)
class Floor:
    """What W1 cannot be faster than on this machine, in milliseconds."""

    ttft_ms: float
    tpot_ms: float


def floor_of(weights: Weights, shape: ModelShape, limits: Limits) -> Floor:
    """W1's floor: every weight read once a token; a prompt's operations at the best GEMM rate for its weights."""
    is_bf16 = weights is Weights.BF16
    rate = max(limits.gemm_float32, limits.gemm_bfloat16) if is_bf16 else limits.gemm_int8
    weight_bytes = shape.decode_bytes(layer_weight_bytes=2 if is_bf16 else 1)
    return Floor(shape.prefill_flops(W1.prompt_tokens) / rate / 1e6, weight_bytes / limits.read / 1e6)


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One way of storing weights: each server's command and seconds to its ready block, and what was measured."""

    weights: str
    commands: dict[str, str]
    start_s: dict[str, float]
    measurement: Measurement


def checkpoint(name: str, stored: CheckpointFormat) -> Path:
    """The directory of a shape's checkpoint, written unless it is there."""
    directory = BUILD / f"{name}-{stored.value}"
    if not (directory / "config.json").is_file():
        print(f"writing {directory}", file=sys.stderr, flush=True)
        make_checkpoint(directory, SHAPES[name], seed=_SEED, stored=stored)
    return directory


def servers(weights: Weights, model: Path, *, threads: int) -> tuple[LocalServer, LocalServer]:
    """The two ways to serve: in one process, and handed over. Both may use every core: they take turns."""
    flags = ("--dtype", "bfloat16", "--kv-memory", "2GiB", "--threads", str(threads), *weights.flags)
    return (
        LocalServer("colocated", model, ("--prefill", "0", *flags)),
        LocalServer("handed over", model, ("--prefill", "1", *flags)),
    )


def run_kernels(limits: Limits) -> tuple[list[KernelResult], Limits]:
    """Every kernel, and the limits that were seen meanwhile."""
    stored = [each for each in STORED if each.name in _KERNEL_WEIGHTS]
    backend = select("cpu", threads=limits.threads)
    return measure_kernels(backend, names=MEASURED_SHAPES, stored=stored, seconds=_PROBE_S, limits=limits)


class LimitProbe:
    """Measures the limits again and again, and keeps the best: a busy neighbour hides them at any one moment."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def again(self) -> None:
        """Takes about a second."""
        self.limits = best_limits(self.limits, measure_limits(threads=self.limits.threads, seconds=_BETWEEN_S))


def run_system(weights: Weights, options: argparse.Namespace, probe: LimitProbe) -> SystemResult:
    """Starts both servers, measures them and the limits in turns, ends them."""
    shape = SHAPES[options.shape]
    model = checkpoint(options.shape, weights.checkpoint)
    plan = make_plan(options, [WORKLOADS[name] for name in options.workloads])
    plan = dataclasses.replace(plan, vocab_size=shape.vocab_size)
    both = servers(weights, model, threads=probe.limits.threads)
    with ExitStack() as stack:
        for server in both:
            stack.enter_context(server)
        measurement = measure_now([server.target for server in both], plan, Observer(tell, probe.again))
    return SystemResult(
        weights=weights.value,
        commands={server.name: server.command for server in both},
        start_s={server.name: server.start_s for server in both},
        measurement=measurement,
    )


def floor_table(results: Sequence[SystemResult], shape: ModelShape, limits: Limits) -> str:
    """W1 beside its floor: shares of what the machine can do."""
    rows = [
        (system.weights, found.target, *_beside(found, floor_of(Weights(system.weights), shape, limits)))
        for system in results
        for found in system.measurement.results
        if found.phase == W1.name
    ]
    return format_table(("weights", "server", "TTFT ms", "floor", "share", "TPOT ms", "floor", "× floor"), rows)


def _beside(found: PhaseResult, floor: Floor) -> tuple[float, ...]:
    middle = medians(found.rounds)
    ttft, tpot = middle.ttft_p50_ms, middle.tpot_p50_ms
    return ttft, floor.ttft_ms, floor.ttft_ms / ttft, tpot, floor.tpot_ms, tpot / floor.tpot_ms


def main(argv: Sequence[str]) -> int:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of W1 and W2, no kernels")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--weights", nargs="+", choices=[each.value for each in Weights], default=["bf16", "w8a8"])
    parser.add_argument("--threads", type=int, default=describe_machine().num_cores)
    parser.add_argument("--name", default="local", help=f"of the file under {RESULTS}")
    add_plan_arguments(parser)
    options = parser.parse_args(argv)
    options.workloads = options.workloads or list(_QUICK_WORKLOADS if options.quick else WORKLOADS)
    if options.quick:
        options.rounds = 1
    limits = measure_limits(threads=options.threads)
    kernels: list[KernelResult] = []
    if not options.quick:
        kernels, limits = run_kernels(limits)
        print(f"kernels\n\n{kernels_table(kernels)}\n", flush=True)
    probe = LimitProbe(limits)
    systems = []
    for name in options.weights:
        system = run_system(Weights(name), options, probe)
        systems.append(system)
        print(f"{name}\n\n{measurement_table(system.measurement)}\n", flush=True)
    limits = probe.limits
    print(f"limits of this machine\n\n{limits_table(limits)}\n")
    print(f"W1 beside its floor\n\n{floor_table(systems, SHAPES[options.shape], limits)}")
    content = {
        "command": ["python", "-m", "bench.run", *argv],
        "limits": dataclasses.asdict(limits),
        "kernels": [result_fields(kernel) for kernel in kernels],
        "systems": [dataclasses.asdict(system) for system in systems],
    }
    write_result(RESULTS / f"{options.name}.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
