"""A worker process from start to end: load, serve, register, drain on SIGTERM, stop.

    load rank ─▶ start engine ─▶ bind and serve ─▶ register ─▶ (SIGTERM) drain ─▶ stop
                                                                └─ again: stop at once

The exit code is 0 after a drain, 1 when the engine thread failed or the second signal came.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

import uvloop

from engine.cache.prefix import CacheEvents
from engine.engine import EngineCounts
from staffetta import failpoint
from staffetta.address import cannot_listen, parse_address
from staffetta.config.schema import WorkerConfig
from staffetta.exits import UsageError
from staffetta.rpc import logging as rpc_logging
from staffetta.rpc.server import BindError, RpcServer
from staffetta.v1 import common_pb2, control_pb2, control_pb2_grpc, registry_pb2
from worker.control import ControlServicer, drain
from worker.rank import Rank, load_rank
from worker.registration import Registration

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
LOAD_PATIENCE_S = 0.2


class Service(Protocol):
    """What a role adds to a worker. Made on the event loop, once the rank is loaded."""

    def add_to(self, server: RpcServer) -> None:
        """Adds the servicer."""

    def start(self) -> None:
        """Starts the engine and the role's own tasks."""

    def num_requests(self) -> int:
        """Requests that have not ended."""

    def num_sessions(self) -> int:
        """Open sessions."""

    def prefills_locally(self) -> bool:
        """Whether the worker may compute prompts of its own requests."""

    def begin_drain(self) -> None:
        """Refuses new requests."""

    def cancel_all(self) -> int:
        """Cancels every request."""

    def handoff_counts(self) -> Sequence[control_pb2.HandoffCount]:
        """How hand-offs ended."""

    def links(self) -> Sequence[registry_pb2.PeerLink]:
        """Working sessions to prefill workers."""

    def on_peers(self, gateway: str, peers: Sequence[registry_pb2.Peer]) -> None:
        """Hears which prefill workers a gateway names."""

    async def close(self) -> None:
        """Ends the role's tasks and readers; afterwards nothing of it touches the pool."""


class Worker:
    """One running worker: what control and registration ask of it. Event loop only."""

    def __init__(self, rank: Rank, make_service: "Callable[[Worker], Service]") -> None:
        self.rank = rank
        self.identity = rank.identity
        self.backend = rank.runner.backend_name
        self._server = RpcServer(["staffetta.v1.ControlService", *_SERVICE_OF_ROLE[rank.identity.role]])
        self._service = make_service(self)
        self._registration: Registration | None = None
        self._is_draining = False
        self._failed = asyncio.Event()
        self._asked: asyncio.Future[EngineCounts] | None = None
        self._last_counts: EngineCounts | None = None
        self._loop = asyncio.get_running_loop()

    def on_engine_failure(self, error: BaseException) -> None:
        """The engine's loop is over: so is this worker. Engine thread."""
        self._loop.call_soon_threadsafe(self._failed.set)

    def report_now(self) -> None:
        """Something that gateways should know at once has changed."""
        if self._registration is not None:
            self._registration.report_now()

    # For control

    async def counts(self) -> EngineCounts:
        """The engine's counts, taken on its thread."""
        return await asyncio.wrap_future(self.rank.engine_thread.ask(lambda engine: engine.counts()))

    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._service.num_requests()

    def num_sessions(self) -> int:
        """Open sessions."""
        return self._service.num_sessions()

    def handoff_counts(self) -> Sequence[control_pb2.HandoffCount]:
        """How hand-offs ended."""
        return self._service.handoff_counts()

    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    async def begin_drain(self) -> None:
        """Refuses new requests and says so to probes and gateways."""
        if not self._is_draining:
            self._is_draining = True
            self._service.begin_drain()
            await self._server.set_draining()
            self.report_now()

    def cancel_all(self) -> int:
        """Cancels every request."""
        return self._service.cancel_all()

    # For registration

    async def load(self) -> registry_pb2.WorkerLoad:
        """The load now, or as it was when the engine, in a long step, last had time to tell."""
        if self._asked is None:
            self._asked = asyncio.ensure_future(self.counts())
        done, _ = await asyncio.wait({self._asked}, timeout=LOAD_PATIENCE_S)
        if done:
            self._last_counts = self._asked.result()
            self._asked = None
        counts = self._last_counts
        if counts is None:
            return registry_pb2.WorkerLoad(is_draining=self._is_draining)
        return registry_pb2.WorkerLoad(
            num_running=counts.num_running,
            num_waiting=counts.num_waiting + counts.num_held,
            num_pending_tokens=counts.num_pending_tokens,
            num_available_blocks=counts.free_blocks + counts.cached_blocks,
            is_draining=self._is_draining,
            engine_steps=counts.engine_steps,
            free_blocks=counts.free_blocks,
            cached_blocks=counts.cached_blocks,
            quarantined_blocks=counts.quarantined_blocks,
            held_blocks=counts.held_blocks,
        )

    async def cache_events(self) -> CacheEvents:
        """What entered and left the prefix cache since the last call."""
        return await asyncio.wrap_future(self.rank.engine_thread.ask(lambda engine: engine.drain_cache_events()))

    async def cache_snapshot(self) -> CacheEvents:
        """The whole prefix cache."""
        return await asyncio.wrap_future(self.rank.engine_thread.ask(lambda engine: engine.cache_snapshot()))

    def links(self) -> Sequence[registry_pb2.PeerLink]:
        """Working sessions to prefill workers."""
        return self._service.links()

    # The course of the process

    async def run(self) -> int:
        """Serves until told to stop; returns the exit code."""
        config = self.rank.config
        terminations: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, terminations.put_nowait, number)
        self._service.start()
        try:
            address = await self._serve(config.listen)
            registration = Registration(
                config.gateways, self._announcement(address), self, on_peers=self._service.on_peers
            )
            self._registration = registration
            log.info("%s serves on %s", self.identity.worker_id, address)
            if not (config.gateways or getattr(config, "prefill_peers", ())):
                log.warning("no gateways are set: only peers that are told %s find this worker", address)
            registering = asyncio.create_task(registration.run(), name="registration")
            registering.add_done_callback(_log_failure)
            self.rank.touch_pool()
            try:
                return await self._serve_until_told(terminations)
            finally:
                registering.cancel()
                await asyncio.gather(registering, return_exceptions=True)
        finally:
            await self._server.stop(grace_s=STOP_GRACE_S)
            await self._service.close()
            await asyncio.to_thread(self.rank.stop)

    async def _serve(self, listen: str) -> str:
        """Binds and serves; returns the bound host:port. Raises PortError."""
        self._service.add_to(self._server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(ControlServicer(self), self._server.grpc)
        try:
            address = await self._server.start(listen)
        except BindError as error:
            raise cannot_listen(parse_address(listen), error, flag="--listen") from error
        await self._server.set_serving()
        return address

    async def _serve_until_told(self, terminations: "asyncio.Queue[int]") -> int:
        told = asyncio.create_task(terminations.get())
        failed = asyncio.create_task(self._failed.wait())
        await asyncio.wait({told, failed}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            told.cancel()
            return 1
        log.info("%s drains", self.identity.worker_id)
        draining = asyncio.create_task(self._drain())
        told_again = asyncio.create_task(terminations.get())
        await asyncio.wait({draining, told_again, failed}, return_when=asyncio.FIRST_COMPLETED)
        is_drained = draining.done()
        for task in (draining, told_again, failed):
            task.cancel()
        return 0 if is_drained else 1

    async def _drain(self) -> None:
        async for progress in drain(self, timeout_s=self.rank.config.drain_s):
            log.info("%s: %d requests left", self.identity.worker_id, progress.num_remaining)

    def _announcement(self, address: str) -> registry_pb2.WorkerAnnouncement:
        config = self.rank.config
        bound = parse_address(address)
        if config.gateways and not config.advertise and bound.host in ("0.0.0.0", "::"):  # noqa: S104
            raise UsageError(
                "ADVERTISE_MISSING",
                f"the worker listens on {address}, which no peer can dial",
                why="gateways tell decode workers and each other the address that a worker announces",
                fix=f"--advertise $(hostname):{bound.port}",
            )
        return registry_pb2.WorkerAnnouncement(
            identity=self.identity,
            address=config.advertise or address,
            num_blocks=self.rank.num_blocks,
            max_model_len=self.rank.request_limits.max_model_len,
            prefills_locally=self._service.prefills_locally(),
            pool_bytes=self.rank.num_blocks * self.rank.layout.page_bytes,
            num_parameters=self.rank.runner.num_parameters,
            backend=self.backend,
        )


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the registration ended; gateways do not hear of this worker any more", exc_info=error)


_SERVICE_OF_ROLE = {
    common_pb2.WORKER_ROLE_PREFILL: ("staffetta.v1.PrefillService",),
    common_pb2.WORKER_ROLE_DECODE: ("staffetta.v1.DecodeService",),
}


def run_worker(
    config: WorkerConfig, role: common_pb2.WorkerRole.ValueType, make_service: Callable[[Worker], Service]
) -> int:
    """Runs one worker in this process and returns its exit code. Raises OperatorError when it cannot start."""
    failpoint.arm(config.failpoints)
    rank = load_rank(config, role)
    # A collection that went through what was imported and loaded, some 200,000 objects, would stop every thread for
    # a tenth of a second; nothing of it ever becomes garbage.
    gc.collect()
    gc.freeze()
    rpc_logging.configure(rank.identity.worker_id, config.log_level)

    async def main() -> int:
        return await Worker(rank, make_service).run()

    return uvloop.run(main())
