"""The load generator: `python -m bench.serve ours=http://127.0.0.1:8000 other=http://127.0.0.1:8001`.

Any number of servers that run already, over HTTP with OpenAI's completions or over our gRPC door, alternate in one run
over the workloads W1 to W4, or one of the command line's own. Prints a table with ratios to the first server; writes
JSON with the machine's description. Every server must serve the same shape.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure import Measurement, Observer, Plan, measure, measurement_table
from bench.record import Slo
from bench.result import write_result
from bench.target import TargetError, make_target, parse_target
from bench.workload import WORKLOADS, Workload
from staffetta.exits import ExitCode, OperatorError


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What a plan needs to know."""
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="W", help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of each workload on each server; medians are over them")
    parser.add_argument("--rate", type=float, help="W4's requests per second; default 60%% of the first's capacity")
    parser.add_argument("--requests", type=int, help="W4's requests in a round, or the custom workload's")
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0, help="goodput counts requests within it")
    parser.add_argument("--slo-tpot-ms", type=float, default=200.0, help="goodput counts requests within it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=32_000, help="prompts are drawn from ids below it")


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
        seed=options.seed,
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


def measure_now(addresses: Sequence[str], plan: Plan, observer: Observer) -> Measurement:
    """Runs `plan` against servers named as on the command line, to its end."""
    import uvloop

    async def run() -> Measurement:
        targets = [make_target(parse_target(address)) for address in addresses]
        return await measure(targets, plan, observer)

    return uvloop.run(run())


def main(argv: Sequence[str]) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("servers", nargs="+", help="[NAME=]http://HOST:PORT or [NAME=]grpc://HOST:PORT")
    add_plan_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, help="measures a workload of these sizes instead")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time, unless --rate is given")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    options = parser.parse_args(argv)
    try:
        measurement = measure_now(options.servers, make_plan(options, _chosen(options)), Observer(tell))
    except (OperatorError, TargetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    print(measurement_table(measurement))
    if options.output:
        write_result(options.output, {"command": list(argv), "measurement": dataclasses.asdict(measurement)})
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
