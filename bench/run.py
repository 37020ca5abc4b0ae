"""`make bench`: our own system on this machine, whole: limits, kernels, and W1 to W4 colocated and handed over.

1. The checkpoint is written, once. 2. The machine's limits are measured. 3. The kernels (`bench.kernels`). 4. For each
way of storing weights, one server that prefills where it decodes and one that hands over alternate over the workloads,
each stopped outside its turns; the limits are measured again between rounds. 5. Tables, the bars that need no peer,
and one JSON file. `--quick` measures W1 and W2 once and takes under two minutes.
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

from bench.bars import Bar, bar_fields, bars_table, limit_bars, own_bars
from bench.freeze import Turns, settle
from bench.kernels import MEASURED_SHAPES, STORED, KernelResult, kernels_table, measure_kernels, result_fields
from bench.limits import LimitProbe, Limits, limits_table, measure_limits
from bench.local_server import LocalServer
from bench.machine import describe_machine
from bench.make_checkpoint import CheckpointFormat, make_checkpoint
from bench.measure import Measurement, Observer, conditions, measurement_table
from bench.model_costs import Arithmetic, ModelCosts
from bench.result import write_result
from bench.serve import add_plan_arguments, make_plan, measure_now, tell
from bench.shapes import SHAPES, ModelShape
from bench.workload import W1, W2, WORKLOADS
from kernels.backend import select

BUILD: Final = Path("build/bench")
RESULTS: Final = Path("bench/results")
_SEED: Final = 1
_QUICK_WORKLOADS: Final = (W1.name, W2.name)
_CELL_S: Final = 0.2
_REQUESTS: Final = 20
"""W4's in a round: with them everything takes a quarter of an hour."""
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
    def arithmetic(self) -> Arithmetic:
        """What they are computed in."""
        return Arithmetic.BF16 if self is Weights.BF16 else Arithmetic.INT8

    @property
    def flags(self) -> tuple[str, ...]:
        """What `staffetta serve` is told."""
        return ("--quantization", "int8") if self is Weights.INT8 else ()


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One way of storing weights: each server's command and seconds to its ready block, and what was measured; the
    machine's limits between rounds by workload, and what they allow for each round of W1."""

    weights: str
    commands: dict[str, str]
    start_s: dict[str, float]
    measurement: Measurement
    limits: dict[str, list[Limits]]
    limits_of_rounds: list[Limits]


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
        LocalServer("handed over", model, ("--prefill", "1", "--no-local-prefill", *flags)),
    )


def run_kernels(threads: int) -> list[KernelResult]:
    """Every kernel."""
    stored = [each for each in STORED if each.name in _KERNEL_WEIGHTS]
    backend = select("cpu", threads=threads)
    return measure_kernels(backend, names=MEASURED_SHAPES, stored=stored, seconds=_CELL_S)


def run_system(weights: Weights, options: argparse.Namespace) -> SystemResult:
    """Starts both servers, measures them and the limits in turns, ends them."""
    shape = SHAPES[options.shape]
    model = checkpoint(options.shape, weights.checkpoint)
    plan = make_plan(options, [WORKLOADS[name] for name in options.workloads])
    plan = dataclasses.replace(plan, vocab_size=shape.vocab_size)
    both = servers(weights, model, threads=options.threads)
    probe = LimitProbe(threads=options.threads)
    with ExitStack() as stack:
        for server in both:
            stack.enter_context(server)
        turns = Turns({server.name: server.pid for server in both})
        settle([server.pid for server in both])
        measurement = measure_now([server.target for server in both], plan, Observer(tell, probe.again), turns)
    return SystemResult(
        weights=weights.value,
        commands={server.name: server.command for server in both},
        start_s={server.name: server.start_s for server in both},
        measurement=measurement,
        limits=probe.samples,
        limits_of_rounds=probe.of_rounds(),
    )


def system_bars(system: SystemResult, shape: ModelShape) -> list[Bar]:
    """What both servers reach of the machine, and of themselves."""
    arithmetic = Weights(system.weights).arithmetic
    costs = ModelCosts.from_shape(shape, arithmetic)
    bars: list[Bar] = []
    for server in system.commands:
        bars += limit_bars(system.measurement, server=server, costs=costs, limits=system.limits_of_rounds)
        bars += own_bars(system.measurement, server=server, arithmetic=arithmetic)
    return bars


def system_fields(system: SystemResult, shape: ModelShape) -> dict[str, object]:
    """One system as JSON has it."""
    return {**dataclasses.asdict(system), "bars": [bar_fields(bar) for bar in system_bars(system, shape)]}


def main(argv: Sequence[str]) -> int:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of W1 and W2, no kernels")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--weights", nargs="+", choices=[each.value for each in Weights], default=["bf16", "w8a8"])
    parser.add_argument("--threads", type=int, default=describe_machine().num_cores)
    parser.add_argument("--name", default="local", help=f"of the file under {RESULTS}")
    add_plan_arguments(parser)
    parser.set_defaults(requests=_REQUESTS)
    options = parser.parse_args(argv)
    options.workloads = options.workloads or list(_QUICK_WORKLOADS if options.quick else WORKLOADS)
    if options.quick:
        options.rounds = 1
    limits = measure_limits(threads=options.threads)
    kernels: list[KernelResult] = []
    if not options.quick:
        kernels = run_kernels(options.threads)
        print(f"kernels\n\n{kernels_table(kernels)}\n", flush=True)
    systems = []
    for name in options.weights:
        system = run_system(Weights(name), options)
        systems.append(system)
        found, bars = system.measurement, bars_table(system_bars(system, SHAPES[options.shape]))
        print(f"{name}\n\n{measurement_table(found)}\n\n{conditions(found)}\n\n{bars}\n", flush=True)
    samples = [limits, *(each for system in systems for found in system.limits.values() for each in found)]
    print(f"limits of this machine, before the servers and between rounds\n\n{limits_table(samples)}")
    content = {
        "command": ["python", "-m", "bench.run", *argv],
        "limits": dataclasses.asdict(limits),
        "kernels": [result_fields(kernel) for kernel in kernels],
        "systems": [system_fields(system, SHAPES[options.shape]) for system in systems],
    }
    write_result(RESULTS / f"{options.name}.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
