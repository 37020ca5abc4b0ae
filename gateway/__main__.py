"""`python -m gateway`, which is `staffetta gateway`: one gateway with settings from flags, environment and file."""

import sys
from collections.abc import Sequence

from staffetta.config.load import load, load_role
from staffetta.config.origin import OriginKind
from staffetta.config.schema import GatewayConfig
from staffetta.exits import UsageError, run


def run_gateway(argv: Sequence[str]) -> int:
    """Runs until SIGTERM has drained the gateway; the exit code. Raises OperatorError."""
    config = load_role(GatewayConfig, argv)
    if config.workers == 1:
        _refuse_idle_registry(argv)
    # Only now: a wrong flag is told at once, not after the imports.
    from gateway.main import main

    return main(config)


def _refuse_idle_registry(argv: Sequence[str]) -> None:
    origin = load(GatewayConfig, argv).origins["registry"]
    if origin.kind is not OriginKind.DEFAULT:
        raise UsageError(
            "REGISTRY_UNUSED",
            f"{origin.where}: a gateway of one process has no such address",
            why="workers register at its gRPC door; the registry has an address of its own when workers is above 1",
            fix="--workers 2",
        )


if __name__ == "__main__":
    raise SystemExit(run(lambda: run_gateway(sys.argv[1:])))
