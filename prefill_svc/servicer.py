"""Serves `PrefillService`: computes prompts, announces their blocks chunk by chunk, holds them until they are read.

The life of a hand-off, seen from here:

1. `StartPrefill` (and `AppendPrefillPrompt` for long prompts) arrives on a session; the request goes to the engine.
2. The engine thread computes chunks; the output of every step comes back to the event loop.
3. New final blocks are checksummed on one thread of their own and announced as `ChunkReady`; their lease has begun.
4. `FirstToken` is sent as soon as it is sampled, whether or not the checksums before it are done.
5. `ReleasePrefill`, the session's end, or the lease's expiry frees the blocks.

It never writes anybody else's memory and never waits for a reader.
"""

import asyncio
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import grpc.aio

from engine.request import FinalBlock, FinishReason, Request, RequestId, RequestKind, SequenceOutput, StepOutput
from kvtransfer.checksum import head_checksums
from kvtransfer.manifest import BlockEntry
from kvtransfer.transport import KVExporter
from staffetta import failpoint
from staffetta.errors import DrainingError, HandoffFailedError, ProtocolError, QueueFullError, StaffettaError
from staffetta.rpc.options import MAX_MESSAGE_BYTES
from staffetta.rpc.session import SessionPipe
from staffetta.rpc.status import failure_of
from staffetta.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from worker.admission import PromptParts, check_prefill
from worker.codec import entry_to_proto, finish_reason_to_proto, offer_to_proto, sampling_from_proto, token_to_proto
from worker.pairing import check_pair, check_protocol
from worker.rank import Rank
from worker.sessions import serve_session

log = logging.getLogger(__name__)

LEASE_SWEEP_S = 0.5
MAX_HOLD_S = 600.0
CHUNK_BYTES = 64 * 2**20
"""Bound of what one announcement makes its reader read at once, so that every read ends soon and shows progress."""
EVENTS_PER_MESSAGE = 64
"""64 first tokens with 20 alternatives each stay below the message bound; a chunk has a message of its own."""

_Pipe = SessionPipe[prefill_pb2.PrefillSessionRequest, prefill_pb2.PrefillSessionResponse]


@dataclass(slots=True, eq=False)
class _Session:
    """One decode worker's stream."""

    session_id: str
    peer: str
    pipe: _Pipe
    session_keys: dict[str, bytes] = field(default_factory=dict)
    handoffs: set[str] = field(default_factory=set)

    def send(self, events: list[prefill_pb2.PrefillEvent]) -> None:
        for first in range(0, len(events), EVENTS_PER_MESSAGE):
            part = prefill_pb2.PrefillEvents(events=events[first : first + EVENTS_PER_MESSAGE])
            self.pipe.send(prefill_pb2.PrefillSessionResponse(events=part))


@dataclass(slots=True, eq=False)
class _Handoff:
    """One prefill for one session. `prompt` is None once the engine has it; `ticket` is empty until the first chunk."""

    session: _Session
    start: prefill_pb2.StartPrefill
    prompt: PromptParts | None = None
    ticket: bytes = b""
    lease_ends: float = math.inf
    """From the first chunk on; renewed by every sign of life of the session."""
    held_until: float = math.inf
    """From the first chunk on; no sign of life goes beyond it."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Final blocks that their reader has not been told of yet."""

    handoff_id: str
    blocks: tuple[FinalBlock, ...]


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """All sessions of one prefill worker. Event loop only, except `on_output`, which the engine thread calls."""

    def __init__(
        self,
        rank: Rank,
        exporters: Sequence[KVExporter],
        *,
        max_requests: int,
        heartbeat_s: float,
        max_hold_s: float = MAX_HOLD_S,
    ) -> None:
        """`max_hold_s` bounds how long announced blocks are held, however alive their reader is."""
        self._rank = rank
        self._max_hold_s = max_hold_s
        self._exporters = tuple(exporters)
        self._max_requests = max_requests
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._arrivals = count()
        self._sessions: set[_Session] = set()
        self._handoffs: dict[str, _Handoff] = {}
        self._checksums = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum")
        group = rank.layout.groups[0]
        entry_bytes = 64 + 8 * group.num_kv_heads
        self._blocks_per_message = max(1, min(MAX_MESSAGE_BYTES // 2 // entry_bytes, CHUNK_BYTES // group.block_bytes))
        self._is_draining = False

    # Sessions

    async def Session(  # type: ignore[override]  # noqa: N802 (reads and writes its context instead of yielding)
        self, request_iterator: object, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Serves one decode worker until its stream ends; then frees everything it had."""
        pipe: _Pipe = SessionPipe(context.read, context.write, heartbeat_s=self._heartbeat_s)
        await serve_session(
            pipe,
            context,
            opening=self._open(pipe),
            consume=self._consume,
            make_heartbeat=self._heartbeat,
            close=self._close,
        )

    async def _open(self, pipe: _Pipe) -> _Session:
        first = await pipe.receive()
        if first is None or first.WhichOneof("command") != "open":
            raise ProtocolError("the first message of a session must open it")
        check_protocol(first.open.protocol_version)
        check_pair(self._rank.identity, first.open.identity)
        pipe.expect_heartbeats(first.open.heartbeat_s)
        session = _Session(secrets.token_hex(16), first.open.identity.worker_id, pipe)
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

    def _close(self, session: _Session) -> None:
        self._sessions.discard(session)
        for handoff_id in tuple(session.handoffs):
            self._release(handoff_id)
        for exporter in self._exporters:
            exporter.withdraw(session.session_keys[exporter.transport])
        log.info("session %s of %s ended", session.session_id, session.peer)

    async def _consume(self, session: _Session) -> None:
        while (message := await session.pipe.receive()) is not None:
            match message.WhichOneof("command"):
                case "start":
                    self._start(session, message.start)
                case "append_prompt":
                    self._append(session, message.append_prompt)
                case "release":
                    failpoint.hit("prefill.release_received")
                    if message.release.handoff_id in session.handoffs:
                        self._release(message.release.handoff_id)
                case "heartbeat":
                    self._renew_leases(session)
                case other:
                    raise ProtocolError(f"command {other} has no place in an open session")

    def _heartbeat(self) -> prefill_pb2.PrefillSessionResponse:
        self._rank.engine_thread.wake()
        return prefill_pb2.PrefillSessionResponse(
            heartbeat=common_pb2.Heartbeat(
                engine_turns=self._rank.engine_thread.num_turns, num_requests=len(self._handoffs)
            )
        )

    # From the decode worker to the engine

    def _start(self, session: _Session, start: prefill_pb2.StartPrefill) -> None:
        if start.handoff_id in self._handoffs:
            raise ProtocolError(f"hand-off {start.handoff_id} was started twice")
        handoff = _Handoff(session, start)
        self._handoffs[start.handoff_id] = handoff
        session.handoffs.add(start.handoff_id)
        limits = self._rank.request_limits
        try:
            if self._is_draining:
                raise DrainingError(f"{self._rank.identity.worker_id} is draining; use another prefill worker")
            if len(self._handoffs) > self._max_requests:
                raise QueueFullError(f"the prefill worker holds {self._max_requests} requests already; retry later")
            check_prefill(start, limits, block_size=self._rank.layout.groups[0].block_size)
            handoff.prompt = PromptParts(start.num_prompt_tokens, start.token_ids, limits)
        except StaffettaError as error:
            self._fail(start.handoff_id, error)
            return
        self._admit_when_complete(handoff)

    def _append(self, session: _Session, part: prefill_pb2.AppendPrefillPrompt) -> None:
        handoff = self._handoffs.get(part.handoff_id)
        if handoff is None or handoff.session is not session or handoff.prompt is None:
            return
        try:
            handoff.prompt.append(part.token_ids)
        except StaffettaError as error:
            self._fail(part.handoff_id, error)
            return
        self._admit_when_complete(handoff)

    def _admit_when_complete(self, handoff: _Handoff) -> None:
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
        )
        handoff.prompt = None
        added = self._rank.engine_thread.call(lambda engine: engine.add(request))
        added.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._added, start.handoff_id, future))

    def _added(self, handoff_id: str, added: "Future[None]") -> None:
        if (error := added.exception()) is not None:
            self._fail(handoff_id, error)
        else:
            failpoint.hit("prefill.accepted")

    # From the engine to the decode worker

    def on_output(self, output: StepOutput) -> None:
        """Takes one step's news. Engine thread."""
        self._loop.call_soon_threadsafe(self._dispatch, output)

    def _dispatch(self, output: StepOutput) -> None:
        chunks: list[_Chunk] = []
        events: dict[_Session, list[prefill_pb2.PrefillEvent]] = defaultdict(list)
        for sequence in output.outputs:
            handoff = self._handoffs.get(sequence.request_id)
            if handoff is None:
                continue
            blocks = self._blocks_to_move(handoff, sequence.final_blocks)
            size = self._blocks_per_message
            chunks.extend(
                _Chunk(sequence.request_id, blocks[first : first + size]) for first in range(0, len(blocks), size)
            )
            if sequence.error is not None or sequence.finish_reason is FinishReason.CANCELLED:
                self._fail(sequence.request_id, sequence.error or HandoffFailedError("the prefill was cancelled"))
            elif sequence.tokens:
                events[handoff.session].append(self._first_token(handoff, sequence))
                if handoff.start.num_held_tokens == handoff.start.num_prompt_tokens:
                    # Nothing to move is a hand-off like any other: one chunk, empty, the last.
                    chunks.append(_Chunk(sequence.request_id, ()))
        for session, session_events in events.items():
            session.send(session_events)
            self._after_flush(session, "prefill.first_token_sent")
        for chunk in chunks:
            self._checksums.submit(self._checksum, chunk).add_done_callback(partial(self._checksummed, chunk))

    def _blocks_to_move(self, handoff: _Handoff, blocks: tuple[FinalBlock, ...]) -> tuple[FinalBlock, ...]:
        """Those of `blocks` that the decode worker does not hold."""
        num_held_blocks = handoff.start.num_held_tokens // self._rank.layout.groups[0].block_size
        return tuple(block for block in blocks if block.block_index >= num_held_blocks)

    def _first_token(self, handoff: _Handoff, sequence: SequenceOutput) -> prefill_pb2.PrefillEvent:
        assert sequence.stats is not None, "the engine states what a finished prefill cost"
        return prefill_pb2.PrefillEvent(
            handoff_id=handoff.start.handoff_id,
            first_token=prefill_pb2.FirstToken(
                token=token_to_proto(sequence.tokens[0]),
                finish_reason=finish_reason_to_proto(sequence.finish_reason),
                cached_tokens=sequence.stats.num_cached_tokens,
                queue_s=sequence.stats.queue_s,
                prefill_s=sequence.stats.prefill_s,
            ),
        )

    def _checksum(self, chunk: _Chunk) -> tuple[BlockEntry, ...]:
        """Reads the chunk's blocks. Checksum thread; the blocks are held meanwhile."""
        group = self._rank.layout.groups[0]
        return tuple(
            BlockEntry(
                block_id=block.block_id,
                block_index=block.block_index,
                num_tokens=block.num_tokens,
                generation=block.generation,
                chain_hash=block.chain_hash or b"",
                head_checksums=head_checksums(self._rank.memory.block(block.block_id), group),
            )
            for block in chunk.blocks
        )

    def _checksummed(self, chunk: _Chunk, entries: "Future[tuple[BlockEntry, ...]]") -> None:
        """Checksum thread."""
        self._loop.call_soon_threadsafe(self._announce, chunk, entries)

    def _announce(self, chunk: _Chunk, checksummed: "Future[tuple[BlockEntry, ...]]") -> None:
        """Tells the reader of one chunk. Whatever goes wrong fails this hand-off and no other."""
        handoff = self._handoffs.get(chunk.handoff_id)
        if handoff is None:
            return
        try:
            event = self._chunk_ready(handoff, chunk, checksummed.result())
        except Exception as error:
            if not isinstance(error, StaffettaError):
                log.exception("hand-off %s: its blocks could not be announced", chunk.handoff_id)
            self._fail(chunk.handoff_id, error)
            return
        handoff.session.send([event])
        self._after_flush(handoff.session, "prefill.chunk_sent")

    def _chunk_ready(
        self, handoff: _Handoff, chunk: _Chunk, entries: tuple[BlockEntry, ...]
    ) -> prefill_pb2.PrefillEvent:
        start = handoff.start
        block_ids = [entry.block_id for entry in entries]
        if not handoff.ticket:
            session_keys = handoff.session.session_keys.values()
            handoff.ticket = self._rank.tickets.issue(start.handoff_id, session_keys, block_ids, lease_s=start.lease_s)
        else:
            self._rank.tickets.extend(handoff.ticket, block_ids, lease_s=start.lease_s)
        num_ready_tokens = start.num_held_tokens
        if chunk.blocks:
            last = chunk.blocks[-1]
            num_ready_tokens = last.block_index * self._rank.layout.groups[0].block_size + last.num_tokens
        is_last = num_ready_tokens == start.num_prompt_tokens
        now = self._loop.time()
        handoff.lease_ends = now + start.lease_s
        handoff.held_until = min(handoff.held_until, now + self._max_hold_s)
        return prefill_pb2.PrefillEvent(
            handoff_id=start.handoff_id,
            chunk_ready=prefill_pb2.ChunkReady(
                ticket=handoff.ticket,
                blocks=[entry_to_proto(entry) for entry in entries],
                num_ready_tokens=num_ready_tokens,
                is_last=is_last,
            ),
        )

    def _after_flush(self, session: _Session, name: str) -> None:
        """Marks the failpoint `name` once everything queued so far has left this process."""
        if failpoint.is_armed(name):
            task = asyncio.ensure_future(session.pipe.flush())
            task.add_done_callback(lambda _: failpoint.hit(name))

    # Endings

    def _fail(self, handoff_id: str, error: BaseException) -> None:
        handoff = self._handoffs.get(handoff_id)
        if handoff is None:
            return
        self._release(handoff_id)
        handoff.session.send([prefill_pb2.PrefillEvent(handoff_id=handoff_id, failed=failure_of(error))])

    def _release(self, handoff_id: str) -> None:
        handoff = self._handoffs.pop(handoff_id)
        handoff.session.handoffs.discard(handoff_id)
        if handoff.ticket:
            self._rank.tickets.revoke(handoff.ticket)
        self._rank.engine_thread.submit(lambda engine: engine.release(RequestId(handoff_id)))

    def _renew_leases(self, session: _Session) -> None:
        """The reader is alive: whatever it has been offered stays, up to the bound."""
        now = self._loop.time()
        for handoff in (self._handoffs[handoff_id] for handoff_id in session.handoffs):
            if handoff.ticket and self._rank.tickets.renew(handoff.ticket, lease_s=handoff.start.lease_s):
                handoff.lease_ends = now + handoff.start.lease_s

    async def sweep_leases(self) -> None:
        """Ends hand-offs whose reader did not come in time. Runs on its own timer until cancelled."""
        while True:
            await asyncio.sleep(LEASE_SWEEP_S)
            now = self._loop.time()
            for handoff_id, handoff in tuple(self._handoffs.items()):
                if now > min(handoff.lease_ends, handoff.held_until):
                    self._fail(handoff_id, _unread(handoff.start.lease_s))

    # For control and shutdown

    def num_requests(self) -> int:
        """Hand-offs that have not ended."""
        return len(self._handoffs)

    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def begin_drain(self) -> None:
        """Refuses new hand-offs from now on."""
        self._is_draining = True

    def cancel_all(self) -> int:
        """Fails every hand-off; returns how many there were."""
        handoff_ids = tuple(self._handoffs)
        for handoff_id in handoff_ids:
            self._fail(handoff_id, DrainingError(f"{self._rank.identity.worker_id} is shutting down"))
        return len(handoff_ids)

    def close(self) -> None:
        """Ends the checksum thread."""
        self._checksums.shutdown(wait=True)


def _unread(lease_s: float) -> HandoffFailedError:
    return HandoffFailedError(f"the blocks were not read within their lease of {lease_s:g} s")
