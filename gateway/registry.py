"""The registry's gRPC service: workers join over a stream, report while it lives, and leave by its end.

Membership comes from here alone, never from a client's request. A worker that serves another model is refused.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, cast

import grpc.aio

from gateway.membership import Membership, Worker
from staffetta import validate
from staffetta.errors import IncompatiblePeerError, InvalidRequestError, ProtocolError, StaffettaError, WorkerLostError
from staffetta.rpc.session import SILENT_HEARTBEATS
from staffetta.rpc.status import abort
from staffetta.v1 import common_pb2, registry_pb2, registry_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]

log = logging.getLogger(__name__)

_ROLES: Final = (common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE)


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Serves workers. Event loop only."""

    def __init__(self, workers: Membership, *, model_digest: str, key_fingerprint: str, heartbeat_s: float) -> None:
        self._workers = workers
        self._model_digest = model_digest
        self._key_fingerprint = key_fingerprint
        self._silence_s = SILENT_HEARTBEATS * heartbeat_s
        self._is_ending = asyncio.Event()

    def end(self) -> None:
        """Ends every registration in good order; workers dial again, in vain or another gateway."""
        self._is_ending.set()

    async def Register(  # type: ignore[override]  # noqa: N802 - the service's name
        self, request_iterator: AsyncIterator[registry_pb2.RegisterRequest], context: "Context"
    ) -> None:
        """Keeps a worker registered for as long as its stream lives and is not silent."""
        del request_iterator  # the context reads the same stream, and can be bounded in time
        name = "a worker that has not said its name"
        try:
            first = await self._receive(context)
            if first is None:
                return
            worker = self._admit(first)
            name = worker.worker_id
            await self._serve(worker, first, context)
        except Exception as error:
            if isinstance(error, StaffettaError):
                log.warning("%s: %s", name, error.message)
            else:
                log.exception("%s: its registration ended unexpectedly", name)
            await abort(cast("grpc.aio.ServicerContext[object, object]", context), error)

    async def ListWorkers(  # noqa: N802 - the service's name
        self,
        request: registry_pb2.ListWorkersRequest,
        context: "grpc.aio.ServicerContext[registry_pb2.ListWorkersRequest, registry_pb2.ListWorkersResponse]",
    ) -> registry_pb2.ListWorkersResponse:
        """Lists the workers that are registered now."""
        del request, context
        return self._workers.listed()

    def _admit(self, first: registry_pb2.RegisterRequest) -> Worker:
        announcement = first.announcement
        identity = announcement.identity
        if not first.HasField("announcement"):
            raise ProtocolError("the first message of a registration lacks the announcement")
        validate.check_name(identity.worker_id, param="worker_id")
        if identity.role not in _ROLES:
            raise InvalidRequestError("role is unset; a worker is prefill or decode", param="role")
        if not announcement.address:
            raise InvalidRequestError("address is empty; announce the host:port that peers dial", param="address")
        if not identity.layout.groups or identity.layout.groups[0].block_size < 1:
            raise InvalidRequestError("layout has no group with a block size", param="layout")
        if identity.model_digest != self._model_digest:
            raise IncompatiblePeerError(
                f"model_digest is {identity.model_digest!r} at the worker and {self._model_digest!r} at the gateway; "
                "start both with the same model"
            )
        if identity.key_fingerprint != self._key_fingerprint:
            raise IncompatiblePeerError(
                f"key_fingerprint is {identity.key_fingerprint!r} at the worker and {self._key_fingerprint!r} at the "
                "gateway; start both with the same cluster key"
            )
        return self._workers.join(announcement)

    async def _serve(self, worker: Worker, first: registry_pb2.RegisterRequest, context: "Context") -> None:
        """Serves an admitted worker until its stream or this service ends. Raises what ended either direction.

        A worker that is answered no more must not stay registered: it registers again, and is answered again.
        """
        tasks = [
            asyncio.create_task(self._follow(worker, first, context), name=f"reports-{worker.worker_id}"),
            asyncio.create_task(self._answer(worker, context), name=f"answers-{worker.worker_id}"),
            asyncio.create_task(self._wait_for_end(), name=f"end-{worker.worker_id}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._workers.leave(worker)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, worker: Worker, first: registry_pb2.RegisterRequest, context: "Context") -> None:
        """Takes reports until the stream ends or another stream has taken the worker's name."""
        report: registry_pb2.RegisterRequest | None = first
        due = 1
        while report is not None and not worker.has_left:
            if report.sequence_number != due and not report.is_snapshot:
                log.info("%s: report %d came where %d was due", worker.worker_id, report.sequence_number, due)
                self._workers.forget_cache(worker)
            due = report.sequence_number + 1
            self._workers.report(worker, report)
            report = await self._receive(context)

    async def _answer(self, worker: Worker, context: "Context") -> None:
        """Tells a decode worker its prefill peers whenever they change, always all of them; asks for snapshots."""
        told: tuple[registry_pb2.Peer, ...] = ()
        while True:
            peers = self._workers.prefill_peers() if worker.is_decode else ()
            if peers != told or worker.wants_snapshot:
                told = peers
                response = registry_pb2.RegisterResponse(prefill_peers=peers, wants_snapshot=worker.wants_snapshot)
                worker.wants_snapshot = False
                await context.write(response)
            else:
                await self._workers.wait_for_change()

    async def _wait_for_end(self) -> None:
        await self._is_ending.wait()

    async def _receive(self, context: "Context") -> registry_pb2.RegisterRequest | None:
        """The next report, or None at the stream's end. Raises WorkerLostError after three heartbeats of silence."""
        try:
            async with asyncio.timeout(self._silence_s):
                message: object = await context.read()
        except TimeoutError:
            raise WorkerLostError(f"no report for {self._silence_s:g} s") from None
        return None if message is grpc.aio.EOF else cast(registry_pb2.RegisterRequest, message)
