"""One process of a gateway of several: both doors, no registry. `python -m gateway.child LINK_FD LISTENER_FD`.

What it knows of workers the parent tells it; its sessions to them are its own. Its REST door is a listening socket that
the parent opened, its gRPC door shares the port with its siblings. When the parent is gone, whatever the reason, it
leaves both doors to whoever comes next, finishes what is under way, and ends.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from typing import Final

import grpc.aio
import uvloop

from gateway.app import Gateway, GatewayReady
from gateway.link import Link
from gateway.main import Ends, serve_until_told
from gateway.membership import Membership
from gateway.model import Model, load_model
from gateway.roster import follow
from staffetta.config.resolved import decode
from staffetta.config.schema import GatewayConfig
from staffetta.errors import PreconditionError, UnavailableError
from staffetta.exits import run
from staffetta.rpc import logging as rpc_logging
from staffetta.rpc.options import SHARED_PORT_OPTIONS
from staffetta.rpc.status import abort
from staffetta.v1 import gateway_pb2, registry_pb2, registry_pb2_grpc

ParentLink = Link[gateway_pb2.ParentMessage, gateway_pb2.ChildMessage]

SCRAPE_S: Final = 5.0
"""How long the parent gets to add up the metrics of all: it waits for busy children itself."""

log = logging.getLogger(__name__)


class ListedRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """The registry at a child's gRPC door: who asks is told what the child knows, and nobody registers."""

    def __init__(self, workers: Membership) -> None:
        self._workers = workers

    async def Register(  # type: ignore[override]  # noqa: N802 - the service's name
        self, request_iterator: object, context: "grpc.aio.ServicerContext[object, object]"
    ) -> None:
        """Refuses, and says where registrations are taken."""
        del request_iterator
        refusal = "this gateway has several processes and a port of its own for registrations: give workers the address"
        await abort(context, PreconditionError(f"{refusal} of its --registry in --gateways"))

    async def ListWorkers(  # noqa: N802 - the service's name
        self,
        request: registry_pb2.ListWorkersRequest,
        context: "grpc.aio.ServicerContext[registry_pb2.ListWorkersRequest, registry_pb2.ListWorkersResponse]",
    ) -> registry_pb2.ListWorkersResponse:
        """Lists the workers that are registered now; a session is one of this process."""
        del request, context
        return self._workers.listed()


class ChildGateway(Gateway):
    """A gateway whose registry, address and metrics' sum are its parent's."""

    _rpc_options = SHARED_PORT_OPTIONS

    def __init__(self, config: GatewayConfig, model: Model, *, link: ParentLink, listener: socket.socket) -> None:
        super().__init__(config, model)
        self._link = link
        self._listener = listener
        self._scrape_number = 0
        self._page: asyncio.Future[bytes] | None = None
        """The page that the parent has been asked for by that number, for everybody who waits; empty when there is
        none."""
        self._has_parent = True

    async def start(self) -> GatewayReady:
        """Opens both doors, and tells the parent. Raises OperatorError."""
        ready = await super().start()
        self._tasks.append(asyncio.create_task(self._tell_sessions(), name="sessions"))
        self._link.send(gateway_pb2.ChildMessage(ready=gateway_pb2.ChildReady()))
        return ready

    async def follow_parent(self, ends: Ends) -> None:
        """Does what the parent says, until it is gone or cannot be understood; `ends` is told of that, always: who
        follows nobody must not keep the doors."""
        try:
            while (message := await self._link.receive()) is not None:
                self._take(message)
        except Exception:
            log.exception("the parent cannot be followed")
        finally:
            self._has_parent = False
            self._answer_scrape(b"")
            ends.put_nowait("the parent is gone")

    async def scrape(self) -> bytes:
        """The metrics of all processes. Raises UnavailableError when the parent is gone, or cannot tell them."""
        if not self._has_parent:
            raise _alone()
        if self._page is None:
            self._scrape_number += 1
            self._link.send(gateway_pb2.ChildMessage(scrape=gateway_pb2.PullMetrics(number=self._scrape_number)))
            self._page = asyncio.get_running_loop().create_future()
        page, text = self._page, b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_S):
                text = await asyncio.shield(page)  # others wait for the same
        if self._page is page:  # it did not come; who asks next asks anew
            self._page = None
        if not text:
            raise _untold() if self._has_parent else _alone()
        return text

    async def drain(self, *, timeout_s: float) -> None:
        """As in one process; without a parent it also closes the doors, for who comes after it."""
        if not self._has_parent:
            self._http.close_door()
            self._tasks.append(asyncio.create_task(self._rpc.stop(grace_s=timeout_s), name="leave-grpc"))
        await super().drain(timeout_s=timeout_s)

    def _registry(self) -> registry_pb2_grpc.RegistryServiceServicer:
        return ListedRegistry(self.workers)

    def _warn_of_open_doors(self, ready: GatewayReady) -> None:
        """Nothing: the parent has told, once."""

    def _listen(self) -> socket.socket:
        return self._listener

    def _take(self, message: gateway_pb2.ParentMessage) -> None:
        match message.WhichOneof("message"):
            case "pull":
                page = gateway_pb2.MetricsPage(number=message.pull.number, text=self.metrics.render())
                self._link.send(gateway_pb2.ChildMessage(own_metrics=page))
            case "page":
                if message.page.number == self._scrape_number:
                    self._answer_scrape(message.page.text)
            case _:
                follow(self.workers, message)

    def _answer_scrape(self, text: bytes) -> None:
        page, self._page = self._page, None
        if page is not None:
            page.set_result(text)

    async def _tell_sessions(self) -> None:
        """Tells the parent which sessions are open, whenever that changes."""
        told: list[gateway_pb2.OpenSession] = []
        while True:
            sessions = [
                gateway_pb2.OpenSession(
                    worker_id=worker.worker_id, incarnation=worker.announcement.identity.incarnation
                )
                for worker in self.workers
                if self.workers.has_session(worker)
            ]
            if sessions == told:
                await self.workers.wait_for_change()
                continue
            told = sessions
            self._link.send(gateway_pb2.ChildMessage(sessions=gateway_pb2.OpenSessions(sessions=sessions)))


def _alone() -> UnavailableError:
    return UnavailableError("this process is about to end, and another one will tell; ask again")


def _untold() -> UnavailableError:
    return UnavailableError("the metrics of all processes cannot be told now; the gateway's log says why")


def main(link_fd: int, listener_fd: int) -> int:
    """Runs a child until its parent ends it or has ended; the exit code. Raises OperatorError."""
    uvloop.run(_serve(link_fd, listener_fd))
    return 0


async def _serve(link_fd: int, listener_fd: int) -> None:
    link = await ParentLink.open(socket.socket(fileno=link_fd), gateway_pb2.ParentMessage)
    first = await link.receive()
    if first is None:
        return
    config = decode(GatewayConfig, first.start.config)
    rpc_logging.configure(f"gateway-{first.start.index}", config.log_level)
    ends = Ends()
    model = load_model(config, digest=first.start.model_digest)
    child = ChildGateway(config, model, link=link, listener=socket.socket(fileno=listener_fd))
    follow_parent = asyncio.create_task(child.follow_parent(ends), name="follow-parent")
    try:
        await serve_until_told(child, ends, drain_s=config.drain_s, on_ready=lambda ready: None)
    finally:
        follow_parent.cancel()
        await asyncio.gather(follow_parent, return_exceptions=True)
        link.close()


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(int(sys.argv[1]), int(sys.argv[2]))))
