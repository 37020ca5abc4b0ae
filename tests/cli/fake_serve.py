"""`python -m tests.cli.fake_serve`: the verb `serve`, with `tests.cli.fakes` for gateway and workers."""

import sys

from cli.output import Output
from cli.serve import run_serve
from cli.supervisor import Entries
from staffetta.config.flags import FlagParser, add_settings
from staffetta.config.schema import ServeConfig
from staffetta.exits import run


def main() -> int:
    parser = FlagParser("fake-serve", description="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker-entry", default="tests.cli.fakes:worker_main")
    add_settings(parser, ServeConfig)
    flags = parser.parse(sys.argv[1:])
    entries = Entries("tests.cli.fakes:gateway_main", flags.worker_entry, flags.worker_entry)
    return run_serve(flags, output=Output.JSON if flags.json else Output.TEXT, entries=entries)


if __name__ == "__main__":
    raise SystemExit(run(main))
