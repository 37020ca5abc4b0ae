"""`python -m staffetta.rpc.probe HOST:PORT`: exit code 0 exactly when the server there says SERVING."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from staffetta.exits import ExitCode


def probe(address: str, *, service: str = "", timeout_s: float = 3.0) -> str:
    """The health of a server, or of one of its services, by name: "SERVING", "NOT_SERVING"…; else the call's status."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            status: str = error.code().name
            return status
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    return name


def main(argv: Sequence[str]) -> int:
    """Probes once and prints what it found."""
    parser = argparse.ArgumentParser(prog="python -m staffetta.rpc.probe", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--service", default="", help="full name of one service; empty means the server as a whole")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    status = probe(arguments.address, service=arguments.service, timeout_s=arguments.timeout)
    print(f"{arguments.address} {status}")  # noqa: T201 (a command)
    return ExitCode.OK if status == "SERVING" else ExitCode.PORT_OR_PEER


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
