"""The operator's door to a worker: what it is, what it holds, and a drain that reports its progress."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc.aio

from engine.engine import EngineCounts
from staffetta import __version__
from staffetta.errors import InvalidRequestError, StaffettaError
from staffetta.rpc.status import abort
from staffetta.v1 import common_pb2, control_pb2, control_pb2_grpc

DRAIN_POLL_S = 0.05
MAX_DRAIN_S = 3600.0


class Controlled(Protocol):
    """What control needs of a service."""

    identity: common_pb2.WorkerIdentity
    backend: str

    async def counts(self) -> EngineCounts:
        """The engine's counts, taken on its thread."""

    def num_requests(self) -> int:
        """Requests that have not ended."""

    def num_sessions(self) -> int:
        """Open sessions, of both directions."""

    def handoff_counts(self) -> Sequence[control_pb2.HandoffCount]:
        """How hand-offs ended; empty for prefill workers."""

    def is_draining(self) -> bool:
        """Whether new requests are refused."""

    async def begin_drain(self) -> None:
        """Refuses new requests from now on; idempotent."""

    def cancel_all(self) -> int:
        """Cancels every request and returns how many there were."""


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Serves `ControlService` for one worker. Event loop only."""

    def __init__(self, controlled: Controlled) -> None:
        self._controlled = controlled
        self._started = time.monotonic()

    async def GetInfo(  # noqa: N802 - named by the wire
        self, request: control_pb2.GetInfoRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> control_pb2.GetInfoResponse:
        """Describes the worker."""
        return control_pb2.GetInfoResponse(
            identity=self._controlled.identity,
            version=__version__,
            uptime_s=time.monotonic() - self._started,
            backend=self._controlled.backend,
        )

    async def GetLoad(  # noqa: N802 - named by the wire
        self, request: control_pb2.GetLoadRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> control_pb2.GetLoadResponse:
        """Counts what the worker holds now."""
        try:
            counts = await self._controlled.counts()
        except StaffettaError as error:
            await abort(context, error)
        return control_pb2.GetLoadResponse(
            total_blocks=counts.total_blocks,
            free_blocks=counts.free_blocks,
            held_blocks=counts.held_blocks,
            cached_blocks=counts.cached_blocks,
            quarantined_blocks=counts.quarantined_blocks,
            num_running=counts.num_running,
            num_waiting=counts.num_waiting,
            num_held=counts.num_held,
            engine_steps=counts.engine_steps,
            num_sessions=self._controlled.num_sessions(),
            num_tasks=len(asyncio.all_tasks()),
            num_threads=threading.active_count(),
            num_descriptors=_num_descriptors(),
            is_draining=self._controlled.is_draining(),
            handoffs=self._controlled.handoff_counts(),
            copied_blocks=counts.num_copied_blocks,
        )

    async def Drain(  # noqa: N802 - named by the wire
        self, request: control_pb2.DrainRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[control_pb2.DrainResponse]:
        """Drains, reporting whenever the number of remaining requests changes."""
        if not 0.0 <= request.timeout_s <= MAX_DRAIN_S:
            await abort(
                context,
                InvalidRequestError(f"timeout_s is {request.timeout_s:g}, must be 0 to {MAX_DRAIN_S:g} seconds"),
            )
        async for progress in drain(self._controlled, timeout_s=request.timeout_s):
            yield progress


async def drain(controlled: Controlled, *, timeout_s: float) -> AsyncIterator[control_pb2.DrainResponse]:
    """Stops admission, waits up to `timeout_s` for requests to end, cancels the rest; yields at every change."""
    await controlled.begin_drain()
    deadline = time.monotonic() + timeout_s
    num_reported = -1
    num_cancelled = 0
    while num_remaining := controlled.num_requests():
        if time.monotonic() >= deadline and not num_cancelled:
            num_cancelled = controlled.cancel_all()
        if num_remaining != num_reported:
            num_reported = num_remaining
            yield control_pb2.DrainResponse(num_remaining=num_remaining, num_cancelled=num_cancelled)
        await asyncio.sleep(DRAIN_POLL_S)
    yield control_pb2.DrainResponse(num_remaining=0, num_cancelled=num_cancelled, is_done=True)


def _num_descriptors() -> int:
    directory = Path("/proc/self/fd")
    return sum(1 for _ in directory.iterdir()) if directory.exists() else 0
