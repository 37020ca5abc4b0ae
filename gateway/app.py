"""The parts of a gateway put together: both doors and the registry on one event loop, started and ended as one."""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import uvicorn

from gateway.body_writer import BodyWriterProtocol
from gateway.event_stream import KEEP_ALIVE_S
from gateway.http import make_app
from gateway.journey import Journeys
from gateway.metrics import Metrics
from gateway.model import Model
from gateway.registry import RegistryServicer
from gateway.servicer import InferenceServicer
from gateway.shared_port import BACKLOG, send_at_once
from gateway.workers import Workers
from staffetta.address import Address, cannot_listen, parse_address
from staffetta.config.schema import GatewayConfig
from staffetta.hashing import key_fingerprint
from staffetta.rpc.options import SERVER_OPTIONS
from staffetta.rpc.server import BindError, RpcServer
from staffetta.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc

_HTTP_GRACE_S: Final = 1
_SLACK: Final = 256
"""Connections, and calls, beyond twice the requests: refusals being sent, idle connections, workers, probes."""

log = logging.getLogger(__name__)


class GatewayReady(NamedTuple):
    """The addresses that were bound, host:port each."""

    http: str
    grpc: str
    registry: str
    """Where workers register; with one process on the gRPC door."""


class Gateway:
    """One gateway in one process; as it stands here it is all of it. `gateway.child` makes it one of several. Event
    loop only."""

    _rpc_options: Sequence[tuple[str, int]] = SERVER_OPTIONS

    def __init__(self, config: GatewayConfig, model: Model, *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._config = config
        # Without a key of the configuration nobody else has this one: workers are refused by its fingerprint.
        self._cluster_key = bytes.fromhex(config.cluster_key) or secrets.token_bytes(32)
        self.workers = Workers(gateway_id=f"gateway-{secrets.token_hex(4)}", heartbeat_s=config.heartbeat_s)
        metrics = Metrics(model.name)
        self.journeys = Journeys(model, self.workers, metrics, config=config, cluster_key=self._cluster_key)
        metrics.watch(self.journeys.in_flight, self.workers)
        self._rpc = self._make_rpc_server()
        self.metrics = metrics
        app = make_app(self.journeys, self.scrape, max_body_bytes=config.max_body_bytes, keep_alive_s=keep_alive_s)
        self._http = _HttpServer(
            uvicorn.Config(
                app,
                http=BodyWriterProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_HTTP_GRACE_S,
                # A last resort, answered without a body of ours; requests are refused by admission long before.
                limit_concurrency=_max_concurrent(config),
            )
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> GatewayReady:
        """Opens both doors. Raises OperatorError when an address cannot be had; then nothing is left open."""
        with contextlib.ExitStack() as unless_open:
            listener = unless_open.enter_context(self._listen())
            try:
                grpc_address = await self._rpc.start(self._config.grpc)
            except BindError as error:
                raise cannot_listen(parse_address(self._config.grpc), error, flag="--grpc") from error
            unless_open.pop_all()
        ready = GatewayReady(str(Address(*listener.getsockname()[:2])), grpc_address, grpc_address)
        self._warn_of_open_doors(ready)
        self._tasks = [
            asyncio.create_task(self._http.serve(sockets=[listener]), name="http"),
            asyncio.create_task(self._report_health(), name="health"),
        ]
        return ready

    async def scrape(self) -> bytes:
        """The metrics page."""
        return self.metrics.render()

    async def drain(self, *, timeout_s: float) -> None:
        """Takes no new requests; returns when those under way have ended, or `timeout_s` later."""
        await self._rpc.set_draining()
        await self.journeys.admission.drain(timeout_s=timeout_s)

    async def close(self) -> None:
        """Closes the doors and every session; what is still under way ends here."""
        self._http.end()
        await self._rpc.stop(grace_s=0)
        await self.workers.close()
        self.journeys.close()
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _make_rpc_server(self) -> RpcServer:
        files = (inference_pb2.DESCRIPTOR, registry_pb2.DESCRIPTOR)
        rpc = RpcServer(
            [service.full_name for file in files for service in file.services_by_name.values()],
            max_concurrent_calls=_max_concurrent(self._config),
            options=self._rpc_options,
        )
        inference = InferenceServicer(self.journeys, self.workers)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, rpc.grpc)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(self._registry(), rpc.grpc)
        return rpc

    def _registry(self) -> registry_pb2_grpc.RegistryServiceServicer:
        return RegistryServicer(
            self.workers,
            model_digest=self.journeys.model.digest,
            key_fingerprint=key_fingerprint(self._cluster_key),
            heartbeat_s=self._config.heartbeat_s,
        )

    def _warn_of_open_doors(self, ready: GatewayReady) -> None:
        warn_if_open("REST", ready.http)
        warn_if_open("gRPC", ready.grpc)

    def _listen(self) -> socket.socket:
        """The listening socket of the REST door. Raises PortError for an address that cannot be bound."""
        address = parse_address(self._config.http)
        try:
            listener = socket.create_server(address, family=address.family, backlog=BACKLOG)
        except OSError as error:
            raise cannot_listen(address, error, flag="--http") from error
        send_at_once(listener)
        return listener

    async def _report_health(self) -> None:
        """Health says SERVING while a request sent now would be served."""
        was_ready = False
        while True:
            is_ready = self.journeys.reason_not_ready() is None
            if is_ready == was_ready:
                await self.workers.wait_for_change()
                continue
            was_ready = is_ready
            await (self._rpc.set_serving() if is_ready else self._rpc.set_draining())


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers, since this process has one place for signals, and without its
    polling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._end = asyncio.Event()

    def end(self) -> None:
        """Stops accepting, lets answers under way finish for a moment, then returns from `serve`."""
        self.should_exit = True
        self._end.set()

    def close_door(self) -> None:
        """Stops accepting; everything else goes on."""
        for server in self.servers:
            server.close()

    async def main_loop(self) -> None:
        """Keeps the date header fresh until the end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._end.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def _max_concurrent(config: GatewayConfig) -> int:
    return 2 * config.max_requests + _SLACK


def warn_if_open(door: str, text: str) -> None:
    """Logs a door, host:port, that is not on loopback."""
    if not (address := parse_address(text)).is_loopback:
        log.warning("the %s door on %s is open to the network in plaintext, without authentication", door, address)
