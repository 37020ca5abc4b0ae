"""The gRPC server of every process: health v1, reflection, keep-alive, a bounded message size.

Health says NOT_SERVING until `set_serving`, and again from `set_draining` on, so that probes and load balancers stop
sending before the last request ends.
"""

from collections.abc import Sequence

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE_NAME
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from staffetta.rpc.options import SERVER_OPTIONS


class BindError(OSError):
    """The address cannot be listened on."""


class RpcServer:
    """A grpc.aio server with the services every process has. Event loop only."""

    def __init__(
        self,
        service_names: Sequence[str],
        *,
        max_concurrent_calls: int | None = None,
        options: Sequence[tuple[str, int]] = SERVER_OPTIONS,
    ) -> None:
        """`service_names` are the full names of the services the caller will add to `self.grpc`.

        Calls beyond `max_concurrent_calls` are refused with RESOURCE_EXHAUSTED before they reach a handler; None sets
        no bound. `options` are gRPC's.
        """
        self.grpc = grpc.aio.server(options=options, maximum_concurrent_rpcs=max_concurrent_calls)
        self._service_names = tuple(service_names)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*self._service_names, HEALTH_SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )

    async def start(self, listen: str) -> str:
        """Binds `listen` (host:port, port 0 for a free one), starts serving, and returns the bound host:port.

        Raises BindError when the address is taken or not ours.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self.grpc.add_insecure_port(listen)
        except RuntimeError:
            port = 0
        if port == 0:
            # A server that was never started is stopped all the same: left to its destructor it raises there.
            await self.grpc.stop(None)
            raise BindError(f"cannot listen on {listen}")
        await self.grpc.start()
        return f"{listen.rpartition(':')[0]}:{port}"

    async def set_serving(self) -> None:
        """Tells probes that requests are welcome."""
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def set_draining(self) -> None:
        """Tells probes to stop sending; requests under way go on."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, *, grace_s: float) -> None:
        """Refuses new calls, gives running ones `grace_s` seconds, then cancels them."""
        await self.grpc.stop(grace_s)

    async def _set_health(self, status: int) -> None:
        for name in ("", *self._service_names):
            await self._health.set(name, status)
