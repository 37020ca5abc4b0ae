"""Announces the blocks of every hand-off to its reader, and holds them under a lease until they are read.

A step's final blocks are checksummed on one thread of their own; then their ticket is issued or extended, their lease
begins, and `ChunkReady` leaves. First tokens do not wait for that. Whatever goes wrong fails one hand-off and no other.

It never waits for a reader, and never holds a block beyond `max_hold_s`, however alive its reader is.
"""

import asyncio
import logging
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from engine.request import FinalBlock, FinishReason, RequestId, SequenceOutput, StepOutput
from kvtransfer.checksum import head_checksums
from kvtransfer.manifest import BlockEntry
from prefill_svc.handoff import Handoff, ReaderSession
from staffetta import failpoint
from staffetta.errors import HandoffFailedError, ProtocolError, StaffettaError
from staffetta.rpc.options import MAX_MESSAGE_BYTES
from staffetta.rpc.status import failure_of
from staffetta.v1 import prefill_pb2
from worker.codec import entry_to_proto, token_to_proto
from worker.rank import Rank

log = logging.getLogger(__name__)

LEASE_SWEEP_S = 0.5
MAX_HOLD_S = 600.0
CHUNK_BYTES = 64 * 2**20
"""Bound of what one announcement makes its reader read at once, so that every read ends soon and shows progress.

Smaller chunks let checksum, read and verification overlap, which gains less than their messages cost.
"""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Final blocks that their reader has not been told of yet."""

    handoff_id: str
    blocks: tuple[FinalBlock, ...]


class Announcer:
    """All hand-offs of one prefill worker that have not ended.

    Event loop only, except `on_output`, which the engine thread calls, and what says that it is the checksum thread's.
    """

    def __init__(self, rank: Rank, *, max_hold_s: float = MAX_HOLD_S) -> None:
        """`max_hold_s` bounds how long announced blocks are held, however alive their reader is."""
        self._rank = rank
        self._max_hold_s = max_hold_s
        self._loop = asyncio.get_running_loop()
        self._handoffs: dict[str, Handoff] = {}
        self._checksums = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum")
        group = rank.layout.groups[0]
        entry_bytes = 64 + 8 * group.num_kv_heads
        self._blocks_per_message = max(1, min(MAX_MESSAGE_BYTES // 2 // entry_bytes, CHUNK_BYTES // group.block_bytes))

    # The hand-offs

    def add(self, handoff: Handoff) -> None:
        """Takes a hand-off that has just been started. Raises ProtocolError when it was started before."""
        handoff_id = handoff.start.handoff_id
        if handoff_id in self._handoffs:
            raise ProtocolError(f"hand-off {handoff_id} was started twice")
        self._handoffs[handoff_id] = handoff
        handoff.session.handoffs.add(handoff_id)

    def get(self, handoff_id: str) -> Handoff | None:
        """The hand-off, unless it has ended or never began."""
        return self._handoffs.get(handoff_id)

    def num_handoffs(self) -> int:
        """Hand-offs that have not ended."""
        return len(self._handoffs)

    # From the engine to the decode worker

    def on_output(self, output: StepOutput) -> None:
        """Takes one step's news. Engine thread."""
        self._loop.call_soon_threadsafe(self._dispatch, output)

    def _dispatch(self, output: StepOutput) -> None:
        chunks: list[_Chunk] = []
        events: dict[ReaderSession, list[prefill_pb2.PrefillEvent]] = defaultdict(list)
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
                self.fail(sequence.request_id, sequence.error or HandoffFailedError("the prefill was cancelled"))
                continue
            handoff.session.send_prompt_logprobs(sequence.request_id, sequence.prompt_tokens)
            if sequence.tokens:
                events[handoff.session].append(self._first_tokens(handoff, sequence))
                if handoff.start.num_held_tokens == handoff.start.num_prompt_tokens:
                    # Nothing to move is a hand-off like any other: one chunk, empty, the last.
                    chunks.append(_Chunk(sequence.request_id, ()))
        for session, session_events in events.items():
            session.send(session_events)
            self._after_flush(session, "prefill.first_token_sent")
        for chunk in chunks:
            self._checksums.submit(self._checksum, chunk).add_done_callback(partial(self._checksummed, chunk))

    def _blocks_to_move(self, handoff: Handoff, blocks: tuple[FinalBlock, ...]) -> tuple[FinalBlock, ...]:
        """Those of `blocks` that the decode worker does not hold."""
        num_held_blocks = handoff.start.num_held_tokens // self._rank.layout.groups[0].block_size
        return tuple(block for block in blocks if block.block_index >= num_held_blocks)

    def _first_tokens(self, handoff: Handoff, sequence: SequenceOutput) -> prefill_pb2.PrefillEvent:
        assert sequence.stats is not None, "the engine states what a finished prefill cost"
        return prefill_pb2.PrefillEvent(
            handoff_id=handoff.start.handoff_id,
            first_tokens=prefill_pb2.FirstTokens(
                tokens=map(token_to_proto, sequence.tokens),
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
            self.fail(chunk.handoff_id, error)
            return
        handoff.session.send([event])
        self._after_flush(handoff.session, "prefill.chunk_sent")

    def _chunk_ready(
        self, handoff: Handoff, chunk: _Chunk, entries: tuple[BlockEntry, ...]
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

    def _after_flush(self, session: ReaderSession, name: str) -> None:
        """Marks the failpoint `name` once everything queued so far has left this process."""
        if failpoint.is_armed(name):
            task = asyncio.ensure_future(session.pipe.flush())
            task.add_done_callback(lambda _: failpoint.hit(name))

    # Endings

    def fail(self, handoff_id: str, error: BaseException) -> None:
        """Ends a hand-off and tells its reader why; does nothing if it has ended already."""
        handoff = self._handoffs.get(handoff_id)
        if handoff is None:
            return
        self.release(handoff_id)
        handoff.session.send([prefill_pb2.PrefillEvent(handoff_id=handoff_id, failed=failure_of(error))])

    def release(self, handoff_id: str) -> None:
        """Ends a hand-off: its ticket is void and its blocks are free. It must not have ended before."""
        handoff = self._handoffs.pop(handoff_id)
        handoff.session.handoffs.discard(handoff_id)
        if handoff.ticket:
            self._rank.tickets.revoke(handoff.ticket)
        self._rank.engine_thread.submit(lambda engine: engine.release(RequestId(handoff_id)))

    def renew_leases(self, session: ReaderSession) -> None:
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
                if now > handoff.lease_ends:
                    self.fail(handoff_id, _unread(f"their lease of {handoff.start.lease_s:g} s"))
                elif now > handoff.held_until:
                    self.fail(handoff_id, _unread(f"the {self._max_hold_s:g} s for which blocks are held at most"))

    def fail_all(self, error: StaffettaError) -> int:
        """Fails every hand-off; returns how many there were."""
        handoff_ids = tuple(self._handoffs)
        for handoff_id in handoff_ids:
            self.fail(handoff_id, error)
        return len(handoff_ids)

    def close(self) -> None:
        """Ends the checksum thread."""
        self._checksums.shutdown(wait=True)


def _unread(limit: str) -> HandoffFailedError:
    return HandoffFailedError(f"the blocks were not read within {limit}")
