"""The load generator: `python -m bench.serve ours=http://127.0.0.1:8000 other=http://127.0.0.1:8001`.

Any number of servers that run already, over HTTP with OpenAI's completions or over our gRPC door, alternate in one run
over the workloads W1 to W4, or one of the command line's own; `--freeze` stops servers outside their turns. Prints a
table with ratios to the first server and, told the `--model` that all of them serve, what the first must reach beside
the others and, with `--limits`, beside the machine. Writes JSON with the machine's description.
"""

import argparse
import asyncio
import dataclasses
import math
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.freeze import Turns, parse_freezes, settle
from bench.machine import describe_machine
from bench.measure import Measurement, Observer, Plan, conditions, measure, measurement_table
from bench.record import Slo
from bench.result import write_result
from bench.target import TargetError, make_target, parse_target
from bench.workload import PEER_RATES, WORKLOADS, Workload
from staffetta.exits import ExitCode, OperatorError

if TYPE_CHECKING:
    from bench.limits import LimitProbe, Limits
    from bench.model_costs import ModelCosts


_MAX_SEED: Final = 2**31


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What a plan needs to know."""
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="W", help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of each workload on each server; medians are over them")
    rates = ", ".join(PEER_RATES)
    parser.add_argument(
        "--rate", type=_rate, help=f"W4's requests per second, or {rates}; default 60%% of the first's capacity"
    )
    parser.add_argument("--requests", type=int, help="W4's requests in a round, or the custom workload's")
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0, help="goodput counts requests within it")
    parser.add_argument("--slo-tpot-ms", type=float, default=200.0, help="goodput counts requests within it")
    parser.add_argument("--seed", type=int, help="repeats a run's prompts; default: drawn, and told")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="prompts are drawn from ids below it")


def _rate(text: str) -> float:
    """A number above 0, or the name of a peer's rate."""
    try:
        rate = PEER_RATES[text] if text in PEER_RATES else float(text)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < math.inf:
        names = ", ".join(PEER_RATES)
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor one of {names}")
    return rate


def make_plan(options: argparse.Namespace, workloads: Sequence[Workload]) -> Plan:
    """The plan for `workloads` that the command line asks for."""
    if options.requests:
        workloads = [
            dataclasses.replace(each, num_requests=options.requests) if each.name in ("W4", "custom") else each
            for each in workloads
        ]
    return Plan(
        workloads=tuple(workloads),
        rounds=options.rounds,
        rate=options.rate,
        slo=Slo(options.slo_ttft_ms / 1e3, options.slo_tpot_ms / 1e3),
        seed=secrets.randbelow(_MAX_SEED) if options.seed is None else options.seed,
        vocab_size=options.vocab_size,
    )


def _chosen(options: argparse.Namespace) -> list[Workload]:
    """The named workloads, or the one described by sizes."""
    if options.prompt_tokens is None:
        return [WORKLOADS[name] for name in options.workloads or WORKLOADS]
    is_open = options.rate is not None
    custom = Workload(
        name="custom",
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        num_requests=options.requests or options.concurrency,
        concurrency=None if is_open else options.concurrency,
        rate=options.rate,
    )
    return [custom]


def tell(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def measure_now(addresses: Sequence[str], plan: Plan, observer: Observer, turns: Turns) -> Measurement:
    """Runs `plan` against servers named as on the command line, to its end. SIGTERM ends it as Ctrl-C does, and
    so does a terminal that closes, unless that is ignored."""
    import uvloop

    async def run() -> Measurement:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if task is not None and signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, task.cancel)
        targets = [make_target(parse_target(address)) for address in addresses]
        return await measure(targets, plan, observer, turns)

    observer.say(f"seed {plan.seed}")
    return uvloop.run(run())


def _probe(options: argparse.Namespace) -> "LimitProbe | None":
    """What measures the limits, if asked for; torch is imported for it alone."""
    if not options.limits:
        return None
    from bench.limits import LimitProbe

    return LimitProbe(threads=options.threads)


def _costs(options: argparse.Namespace) -> "ModelCosts | None":
    """What the served model asks of a machine, if it is told; torch is imported for it alone."""
    if options.model is None:
        return None
    from bench.model_costs import ModelCosts

    return ModelCosts.from_directory(options.model)


def _print_bars(
    names: Sequence[str], costs: "ModelCosts", measurement: Measurement, limits: "Sequence[Limits]"
) -> list[dict[str, object]]:
    """The bars of the first server beside the others and the limits; returns them as a result file has them."""
    from bench.bars import bar_fields, bars_table, limit_bars, own_bars, peer_bars

    ours, *peers = names
    bars = limit_bars(measurement, server=ours, costs=costs, limits=limits)
    bars += own_bars(measurement, server=ours, arithmetic=costs.arithmetic)
    for peer in peers:
        bars += peer_bars(measurement, server=ours, peer=peer, arithmetic=costs.arithmetic)
    print(f"\nbars, {costs.arithmetic.value}\n\n{bars_table(bars)}")
    return [bar_fields(bar) for bar in bars]


def _run(options: argparse.Namespace) -> None:
    """Measures, prints, and writes a result that names neither hosts nor folders."""
    names = [parse_target(each).name for each in options.servers]
    freezes = parse_freezes(options.freeze, names)
    turns, costs, probe = Turns(freezes), _costs(options), _probe(options)
    settle(freezes.values())
    observer = Observer(tell, probe.again) if probe else Observer(tell)
    measurement = measure_now(options.servers, make_plan(options, _chosen(options)), observer, turns)
    content: dict[str, object] = {"servers": names, "measurement": dataclasses.asdict(measurement)}
    print(f"{measurement_table(measurement)}\n\n{conditions(measurement)}")
    if probe:
        from bench.limits import limits_table

        samples = [sample for of_workload in probe.samples.values() for sample in of_workload]
        print(f"\nlimits, between rounds\n\n{limits_table(samples)}")
        content["limits"] = {name: list(map(dataclasses.asdict, found)) for name, found in probe.samples.items()}
    if costs:
        content["bars"] = _print_bars(names, costs, measurement, probe.of_rounds() if probe else ())
    if options.output:
        write_result(options.output, content)


def main(argv: Sequence[str]) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("servers", nargs="+", help="[NAME=]http://HOST:PORT or [NAME=]grpc://HOST:PORT")
    add_plan_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, help="measures a workload of these sizes instead")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time, unless --rate is given")
    parser.add_argument("--model", type=Path, help="directory that all of them serve: prints the table of bars")
    parser.add_argument("--limits", action="store_true", help="measures the machine's limits between rounds")
    parser.add_argument("--threads", type=int, default=describe_machine().num_cores, help="of the limits' probes")
    parser.add_argument(
        "--freeze", action="append", default=[], metavar="NAME=PID", help="stops that process tree outside its turns"
    )
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    options = parser.parse_args(argv)
    try:
        _run(options)
    except (OperatorError, TargetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("error: stopped before the end; every server runs", file=sys.stderr)
        return ExitCode.FAILURE
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
