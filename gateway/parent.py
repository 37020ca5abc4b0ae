"""A gateway of several processes, seen from the parent: it has the registry and the addresses, its children the doors.

1. The addresses are taken; the REST door gets one listening socket for each child, the gRPC door is opened by each.
2. Workers register here; every child is told what the parent knows, and has its own sessions to decode workers.
3. A child that ends is followed by another; its streams are lost, nobody else's.
4. The end: children drain, then the registry closes.

What is one for all lives here: membership, the metrics' sum, and the bound on requests, of which every child has its
share. Never relays a request. Event loop only.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from gateway.app import GatewayReady, warn_if_open
from gateway.children import Children
from gateway.membership import Worker
from gateway.model import Model
from gateway.registry import RegistryServicer
from gateway.roster import Roster
from gateway.shared_port import hold, listen
from staffetta.address import Address, cannot_listen, parse_address
from staffetta.config.resolved import encode
from staffetta.config.schema import GatewayConfig
from staffetta.exits import OperatorError, UsageError
from staffetta.hashing import key_fingerprint
from staffetta.rpc.server import BindError, RpcServer
from staffetta.v1 import gateway_pb2, registry_pb2, registry_pb2_grpc
from staffetta.validate import MAX_CHOICES

_MAX_CALLS: Final = 4096
"""At the registry's door: a stream for each worker, and who asks for the list."""
_LAST_WORDS_S: Final = 2.0
"""What children get beyond the drain to close their sessions."""

_STREAMS_S: Final = 0.5
"""What registrations get to end."""

log = logging.getLogger(__name__)


class Parent:
    """The parent of a gateway's processes."""

    def __init__(self, config: GatewayConfig, model: Model, *, on_failure: Callable[[OperatorError], None]) -> None:
        """`on_failure` is told once, after the start, when a child is not coming back: then the gateway has to end.

        Raises UsageError for so many processes that one of them could never take a request with all its choices.
        """
        if config.max_requests < config.workers * MAX_CHOICES:
            raise UsageError(
                "TOO_MANY_PROCESSES",
                f"{config.workers} processes cannot share {config.max_requests} requests",
                why=f"max_requests is divided, and every process needs {MAX_CHOICES}: the choices of one request",
                fix=f"--workers {max(1, config.max_requests // MAX_CHOICES)}",
            )
        self._on_failure = on_failure
        # As in a gateway of one process: nobody else has a key that is drawn here, but all the children must.
        self._config = replace(config, cluster_key=config.cluster_key or secrets.token_hex(32))
        self._model_digest = model.digest
        self.roster: Final = Roster(tell=self._tell, is_open_everywhere=self._is_open_everywhere)
        self._rpc = RpcServer(
            [registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name], max_concurrent_calls=_MAX_CALLS
        )
        self._registry = RegistryServicer(
            self.roster,
            model_digest=model.digest,
            key_fingerprint=key_fingerprint(bytes.fromhex(self._config.cluster_key)),
            heartbeat_s=config.heartbeat_s,
        )
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(self._registry, self._rpc.grpc)
        self._sockets = contextlib.ExitStack()
        self._listeners = contextlib.ExitStack()
        self._children: Children | None = None

    async def start(self) -> GatewayReady:
        """Opens the registry's door and starts the children; returns when all of them serve. Raises OperatorError."""
        try:
            return await self._start()
        except BaseException:
            await self.close()
            raise

    async def drain(self, *, timeout_s: float) -> None:
        """Lets the children drain and end."""
        if self._children is None:
            return
        # A child that has ended must not keep a door that nobody answers at.
        self._listeners.close()
        self._children.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s + _LAST_WORDS_S):
                await self._children.wait()

    async def close(self) -> None:
        """Ends the children that are left, and the registry."""
        if self._children is not None:
            await self._children.close()
        self._listeners.close()
        self._sockets.close()
        # gRPC writes a traceback for every stream that it has to cancel.
        self._registry.end()
        await self._rpc.stop(grace_s=_STREAMS_S)

    async def _start(self) -> GatewayReady:
        config = self._config
        http, rpc = parse_address(config.http), parse_address(config.grpc)
        http = http._replace(port=self._hold(http, flag="--http"))
        rpc = rpc._replace(port=self._hold(rpc, flag="--grpc"))
        try:
            registry = await self._rpc.start(config.registry)
        except BindError as error:
            raise cannot_listen(parse_address(config.registry), error, flag="--registry") from error
        ready = GatewayReady(str(http), str(rpc), registry)
        for door, address in zip(("REST", "gRPC", "registry's"), ready, strict=True):
            warn_if_open(door, address)
        self._config = replace(config, http=ready.http, grpc=ready.grpc, registry=ready.registry)
        self._children = Children(
            [self._listen(http) for _ in range(config.workers)],
            start_of=self._start_of,
            so_far=self.roster.so_far,
        )
        await self._children.start()
        self._children.failure.add_done_callback(lambda failure: self._on_failure(failure.result()))
        await self._rpc.set_serving()
        return ready

    def _hold(self, address: Address, *, flag: str) -> int:
        port: int = self._sockets.enter_context(hold(address, flag=flag)).getsockname()[1]
        return port

    def _listen(self, address: Address) -> socket.socket:
        try:
            return self._listeners.enter_context(listen(address))
        except OSError as error:
            raise cannot_listen(address, error, flag="--http") from error

    def _start_of(self, index: int) -> gateway_pb2.ChildStart:
        config = replace(self._config, max_requests=share(self._config.max_requests, self._config.workers, index))
        return gateway_pb2.ChildStart(index=index, config=encode(config), model_digest=self._model_digest)

    def _tell(self, message: gateway_pb2.ParentMessage) -> None:
        if self._children is not None:
            self._children.tell(message)

    def _is_open_everywhere(self, worker: Worker) -> bool:
        return self._children is not None and self._children.is_open_everywhere(worker)


def share(total: int, num_parts: int, index: int) -> int:
    """Part `index` of `total`, whole; the parts add up to it and differ by one at most."""
    return total // num_parts + (index < total % num_parts)
