"""Serves `PrefillService`: one session per decode worker carries prompts in, and first tokens and chunks out.

The life of a hand-off, seen from here:

1. `StartPrefill` (and `AppendPrefillPrompt` for long prompts) arrives on a session; the request goes to the engine.
2. The engine thread computes chunks; the output of every step comes back to the event loop.
3. New final blocks are checksummed on one thread of their own and announced as `ChunkReady`; their lease has begun.
4. `PromptLogprobs`, when asked for, leave as they are computed; `FirstTokens` as soon as they are sampled, one for each
   choice. Neither waits for checksums.
5. `ReleasePrefill`, the session's end, or the lease's expiry frees the blocks.

Sessions and their commands are served here; what goes back to the reader, and the leases, are the `Announcer`'s.

It never writes anybody else's memory and never waits for a reader.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import grpc.aio

from engine.request import Request, RequestId, RequestKind
from kvtransfer.transport import KVExporter
from prefill_svc.announcing import Announcer
from prefill_svc.handoff import Handoff, Pipe, ReaderSession
from staffetta import failpoint
from staffetta.errors import DrainingError, ProtocolError, QueueFullError, StaffettaError
from staffetta.rpc.session import SessionPipe
from staffetta.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from worker.admission import PromptParts, check_prefill
from worker.codec import offer_to_proto, sampling_from_proto
from worker.pairing import check_pair, check_protocol
from worker.rank import Rank
from worker.sessions import serve_session

log = logging.getLogger(__name__)


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """All sessions of one prefill worker. Event loop only."""

    def __init__(
        self,
        rank: Rank,
        announcer: Announcer,
        exporters: Sequence[KVExporter],
        *,
        max_requests: int,
        heartbeat_s: float,
    ) -> None:
        self._rank = rank
        self._announcer = announcer
        self._exporters = tuple(exporters)
        self._max_requests = max_requests
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._arrivals = count()
        self._sessions: set[ReaderSession] = set()
        self._is_draining = False

    # Sessions

    async def Session(  # type: ignore[override]  # noqa: N802 (reads and writes its context instead of yielding)
        self, request_iterator: object, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Serves one decode worker until its stream ends; then frees everything it had."""
        pipe: Pipe = SessionPipe(context.read, context.write, heartbeat_s=self._heartbeat_s)
        await serve_session(
            pipe,
            context,
            opening=self._open(pipe),
            consume=self._consume,
            make_heartbeat=self._heartbeat,
            close=self._close,
        )

    async def _open(self, pipe: Pipe) -> ReaderSession:
        first = await pipe.receive()
        if first is None or first.WhichOneof("command") != "open":
            raise ProtocolError("the first message of a session must open it")
        check_protocol(first.open.protocol_version)
        check_pair(self._rank.identity, first.open.identity)
        pipe.expect_heartbeats(first.open.heartbeat_s)
        session = ReaderSession(secrets.token_hex(16), first.open.identity.worker_id, pipe)
        offers = [exporter.offer() for exporter in self._exporters]
        session.session_keys = {offer.transport: offer.session_key for offer in offers}
        self._sessions.add(session)
        opened = prefill_pb2.PrefillSessionOpened(
            session_id=session.session_id,
            identity=self._rank.identity,
            transports=[offer_to_proto(offer) for offer in offers],
            heartbeat_s=self._heartbeat_s,
        )
        pipe.send(prefill_pb2.PrefillSessionResponse(opened=opened))
        log.info("session %s opened by %s", session.session_id, session.peer)
        return session

    def _close(self, session: ReaderSession) -> None:
        self._sessions.discard(session)
        for handoff_id in tuple(session.handoffs):
            self._announcer.release(handoff_id)
        for exporter in self._exporters:
            exporter.withdraw(session.session_keys[exporter.transport])
        log.info("session %s of %s ended", session.session_id, session.peer)

    async def _consume(self, session: ReaderSession) -> None:
        while (message := await session.pipe.receive()) is not None:
            match message.WhichOneof("command"):
                case "start":
                    self._start(session, message.start)
                case "append_prompt":
                    self._append(session, message.append_prompt)
                case "release":
                    failpoint.hit("prefill.release_received")
                    if message.release.handoff_id in session.handoffs:
                        self._announcer.release(message.release.handoff_id)
                case "heartbeat":
                    self._announcer.renew_leases(session)
                case other:
                    raise ProtocolError(f"command {other} has no place in an open session")

    def _heartbeat(self) -> prefill_pb2.PrefillSessionResponse:
        self._rank.engine_thread.turn()
        return prefill_pb2.PrefillSessionResponse(
            heartbeat=common_pb2.Heartbeat(
                engine_turns=self._rank.engine_thread.num_turns, num_requests=self._announcer.num_handoffs()
            )
        )

    # From the decode worker to the engine

    def _start(self, session: ReaderSession, start: prefill_pb2.StartPrefill) -> None:
        handoff = Handoff(session, start)
        self._announcer.add(handoff)
        limits = self._rank.request_limits
        try:
            if self._is_draining:
                raise DrainingError(f"{self._rank.identity.worker_id} is draining; use another prefill worker")
            # One sequence computes a prompt for all its choices, so a hand-off is one, whatever n.
            if (num_handoffs := self._announcer.num_handoffs()) > self._max_requests:
                raise QueueFullError(
                    f"{num_handoffs} prompts would be held here, {self._max_requests} may be; retry later"
                )
            check_prefill(start, limits, block_size=self._rank.layout.groups[0].block_size)
            handoff.prompt = PromptParts(start.num_prompt_tokens, start.token_ids, limits)
        except StaffettaError as error:
            self._announcer.fail(start.handoff_id, error)
            return
        self._admit_when_complete(handoff)

    def _append(self, session: ReaderSession, part: prefill_pb2.AppendPrefillPrompt) -> None:
        handoff = self._announcer.get(part.handoff_id)
        if handoff is None or handoff.session is not session or handoff.prompt is None:
            return
        try:
            handoff.prompt.append(part.token_ids)
        except StaffettaError as error:
            self._announcer.fail(part.handoff_id, error)
            return
        self._admit_when_complete(handoff)

    def _admit_when_complete(self, handoff: Handoff) -> None:
        if handoff.prompt is None or not handoff.prompt.is_complete:
            return
        start = handoff.start
        request = Request(
            request_id=RequestId(start.handoff_id),
            kind=RequestKind.PREFILL,
            prompt_token_ids=handoff.prompt.take(),
            sampling=sampling_from_proto(start.sampling, eos_token_ids=self._rank.eos_token_ids),
            arrival=next(self._arrivals),
            cache_salt=start.cache_salt,
            priority=start.priority,
            first_token_index=start.first_token_index,
            choices=handoff.choices,
        )
        handoff.prompt = None
        added = self._rank.engine_thread.call(lambda engine: engine.add(request))
        added.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._added, start.handoff_id, future))

    def _added(self, handoff_id: str, added: "Future[None]") -> None:
        if (error := added.exception()) is not None:
            self._announcer.fail(handoff_id, error)
        else:
            failpoint.hit("prefill.accepted")

    # For control and shutdown

    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def begin_drain(self) -> None:
        """Refuses new hand-offs from now on."""
        self._is_draining = True

    def cancel_all(self) -> int:
        """Fails every hand-off; returns how many there were."""
        return self._announcer.fail_all(DrainingError(f"{self._rank.identity.worker_id} is shutting down"))
