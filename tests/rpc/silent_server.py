"""A server process for tests: prints its port; whoever opens a prefill session gets a heartbeat every interval.

python -m tests.rpc.silent_server HEARTBEAT_S
"""

import asyncio
import sys
from typing import Any

import grpc.aio

from staffetta.rpc.server import RpcServer
from staffetta.rpc.session import SessionPipe
from staffetta.v1 import prefill_pb2, prefill_pb2_grpc

Pipe = SessionPipe[prefill_pb2.PrefillSessionRequest, prefill_pb2.PrefillSessionResponse]


class Servicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Sends heartbeats and does nothing else."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s

    async def Session(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        pipe: Pipe = SessionPipe(context.read, context.write, heartbeat_s=self._heartbeat_s)

        async def consume() -> None:
            while await pipe.receive() is not None:
                pass

        await pipe.run(consume(), make_heartbeat=prefill_pb2.PrefillSessionResponse)


async def main(heartbeat_s: float) -> None:
    server = RpcServer(["staffetta.v1.PrefillService"])
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(Servicer(heartbeat_s), server.grpc)
    print(await server.start("127.0.0.1:0"), flush=True)
    await server.set_serving()
    await server.grpc.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
