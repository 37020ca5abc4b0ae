"""`python -m decode_svc`, which is `staffetta decode`: one decode worker, set up by flags, environment and file."""

import sys
from collections.abc import Sequence

from staffetta.config.environment import let_idle_threads_sleep
from staffetta.config.load import load_role
from staffetta.config.schema import DecodeConfig
from staffetta.exits import run


def run_decode(argv: Sequence[str]) -> int:
    """Runs until SIGTERM has drained the worker; the exit code. Raises OperatorError."""
    config = load_role(DecodeConfig, argv)
    let_idle_threads_sleep()
    # Only now: a wrong flag is told at once, not after torch's import.
    from decode_svc.main import main

    return main(config)


if __name__ == "__main__":
    raise SystemExit(run(lambda: run_decode(sys.argv[1:])))
