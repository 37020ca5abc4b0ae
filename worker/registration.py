"""Keeps a worker registered with every gateway it is told of: one stream each, redialled while the worker lives.

Each stream starts with the announcement and a snapshot of the prefix cache; after that, reports carry load and what
entered or left the cache since the last one. A gateway that saw a gap in the numbers asks for a snapshot. Event loop
only.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import grpc.aio

from engine.cache.prefix import CacheEvents
from staffetta.errors import StaffettaError
from staffetta.rpc.channel import open_channel
from staffetta.rpc.status import error_of_call
from staffetta.v1 import registry_pb2, registry_pb2_grpc

REPORT_INTERVAL_S = 0.25
REDIAL_S = 0.5
MAX_EVENTS_PER_REPORT = 8192
"""9 bytes an event keeps a report well below the message bound; what is above it waits for the next report."""

log = logging.getLogger(__name__)


class Reporter(Protocol):
    """What a worker tells about itself."""

    async def load(self) -> registry_pb2.WorkerLoad:
        """The load now."""

    async def cache_events(self) -> CacheEvents:
        """What entered and left the prefix cache since the last call."""

    async def cache_snapshot(self) -> CacheEvents:
        """The whole prefix cache, as stored blocks."""

    def links(self) -> Sequence[registry_pb2.PeerLink]:
        """Working sessions to prefill workers; empty for prefill workers."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One gateway's stream and what it has not been told yet: block hash -> whether it is in the cache now."""

    report_now: asyncio.Event = field(default_factory=asyncio.Event)
    changes: dict[int, bool] = field(default_factory=dict)
    wants_snapshot: bool = True

    def take_changes(self) -> list[tuple[int, bool]]:
        """Removes and returns as many changes as one report carries, oldest first."""
        taken = list(islice(self.changes.items(), MAX_EVENTS_PER_REPORT))
        for block_hash, _ in taken:
            del self.changes[block_hash]
        return taken


class Registration:
    """Runs one registration stream per gateway, and one reporter that feeds them all."""

    def __init__(
        self,
        gateways: Sequence[str],
        announcement: registry_pb2.WorkerAnnouncement,
        reporter: Reporter,
        *,
        on_peers: Callable[[str, Sequence[registry_pb2.Peer]], None],
    ) -> None:
        """`on_peers` is told which prefill workers each gateway (first argument) names, whenever that changes."""
        self._gateways = tuple(gateways)
        self._announcement = announcement
        self._reporter = reporter
        self._on_peers = on_peers
        self._streams: set[_Stream] = set()

    def report_now(self) -> None:
        """Sends the next report without waiting for its interval: links or draining changed."""
        for stream in self._streams:
            stream.report_now.set()

    async def run(self) -> None:
        """Registers until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._collect(), name="cache-events")
            for gateway in self._gateways:
                tasks.create_task(self._keep_registered(gateway), name=f"register-{gateway}")

    async def _collect(self) -> None:
        """Drains the cache's events once and gives them to every stream."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            events = await self._reporter.cache_events()
            for stream in self._streams:
                stream.changes.update(dict.fromkeys(events.removed, False))
                stream.changes.update(dict.fromkeys(events.stored, True))

    async def _keep_registered(self, gateway: str) -> None:
        is_first_failure = True
        while True:
            channel = open_channel(gateway)
            try:
                await self._register(gateway, channel)
                log.info("gateway %s closed the registration; dialling again", gateway)
                is_first_failure = True
            except StaffettaError as error:
                if is_first_failure:
                    # A gateway that went away is ordinary; one that refuses this worker is somebody's mistake.
                    level = logging.INFO if error.is_retryable else logging.WARNING
                    log.log(level, "registration with gateway %s ended: %s", gateway, error.message)
                is_first_failure = False
            finally:
                self._on_peers(gateway, ())
                await channel.close()
            await asyncio.sleep(REDIAL_S)

    async def _register(self, gateway: str, channel: grpc.aio.Channel) -> None:
        """Serves one stream to its end. Raises a StaffettaError when that is not the gateway's ordinary close."""
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        stream = _Stream()
        self._streams.add(stream)
        reports = asyncio.create_task(self._report(call.write, stream))
        reads = asyncio.create_task(self._read(gateway, call, stream))
        try:
            done, _ = await asyncio.wait({reports, reads}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write that meets a finished call says so in general terms; the call's status has the reason.
            if (error := await error_of_call(call)) is not None:
                raise error from None
        finally:
            self._streams.discard(stream)
            for task in (reports, reads):
                task.cancel()
            await asyncio.gather(reports, reads, return_exceptions=True)
            call.cancel()

    async def _report(self, write: Callable[[registry_pb2.RegisterRequest], Awaitable[None]], stream: _Stream) -> None:
        number = 0
        while True:
            # Before the report is made: what changes from here on is in the next one, without waiting.
            stream.report_now.clear()
            number += 1
            report = registry_pb2.RegisterRequest(sequence_number=number, load=await self._reporter.load())
            if number == 1:
                report.announcement.CopyFrom(self._announcement)
            report.links.extend(self._reporter.links())
            if stream.wants_snapshot and (snapshot := await self._snapshot()) is not None:
                stream.wants_snapshot = False
                stream.changes = dict.fromkeys(snapshot.stored, True)
                report.is_snapshot = True
            for block_hash, is_stored in stream.take_changes():
                (report.stored_blocks if is_stored else report.removed_blocks).append(block_hash)
            await write(report)
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await stream.report_now.wait()
            except TimeoutError:
                continue

    async def _snapshot(self) -> CacheEvents | None:
        """The whole cache, or None while the engine is in a long step: a report must not wait for that."""
        try:
            async with asyncio.timeout(REPORT_INTERVAL_S):
                return await self._reporter.cache_snapshot()
        except TimeoutError:
            return None

    async def _read(
        self,
        gateway: str,
        call: "grpc.aio.StreamStreamCall[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]",
        stream: _Stream,
    ) -> None:
        async for response in call:
            if response.wants_snapshot:
                stream.wants_snapshot = True
            self._on_peers(gateway, tuple(response.prefill_peers))
