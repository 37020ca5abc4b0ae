"""Runs a role's entry point with a configuration that another process resolved."""

import argparse
import faulthandler
import importlib
import sys
from collections.abc import Callable, Sequence

from cli.lineage import die_with_parent, name_process
from staffetta.config.resolved import decode
from staffetta.config.settings import ROLES
from staffetta.exits import run


def call_entry(entry: str, role: str, config: str) -> int:
    """Calls the function `entry` (module:name) with the role's configuration, `config` being its resolved text."""
    return load_entry(entry)(decode(ROLES[role], config))


def load_entry(entry: str) -> Callable[..., int]:
    """Imports what `entry` (module:name) names."""
    module, _, name = entry.partition(":")
    function: Callable[..., int] = getattr(importlib.import_module(module), name)
    return function


def main(argv: Sequence[str]) -> int:
    """Runs a child of the supervisor: `--parent PID ENTRY ROLE`, the resolved configuration on standard input."""
    parser = argparse.ArgumentParser(prog="cli.entry")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("entry")
    parser.add_argument("role")
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.parent)
    name_process(arguments.role)
    faulthandler.enable()
    return run(lambda: call_entry(arguments.entry, arguments.role, sys.stdin.read()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
