"""`python -m gateway`, which is `staffetta gateway`: one gateway with settings from flags, environment and file."""

import sys
from collections.abc import Sequence

from staffetta.config.load import load_role
from staffetta.config.schema import GatewayConfig
from staffetta.exits import run


def run_gateway(argv: Sequence[str]) -> int:
    """Runs until SIGTERM has drained the gateway; the exit code. Raises OperatorError."""
    config = load_role(GatewayConfig, argv)
    # Only now: a wrong flag is told at once, not after the imports.
    from gateway.main import main

    return main(config)


if __name__ == "__main__":
    raise SystemExit(run(lambda: run_gateway(sys.argv[1:])))
