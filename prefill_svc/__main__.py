"""`python -m prefill_svc`, which is `staffetta prefill`: one prefill worker, set up by flags, environment and file."""

import sys
from collections.abc import Sequence

from staffetta.config.environment import let_idle_threads_sleep
from staffetta.config.load import load_role
from staffetta.config.schema import PrefillConfig
from staffetta.exits import run


def run_prefill(argv: Sequence[str]) -> int:
    """Runs until SIGTERM has drained the worker; the exit code. Raises OperatorError."""
    config = load_role(PrefillConfig, argv)
    let_idle_threads_sleep()
    # Only now: a wrong flag is told at once, not after torch's import.
    from prefill_svc.main import main

    return main(config)


if __name__ == "__main__":
    raise SystemExit(run(lambda: run_prefill(sys.argv[1:])))
