"""One attempt to bring a prompt's KV from a prefill worker: the state machine of the hand-off, on the event loop.

    OPEN ──first chunk, blocks granted──▶ PULLING ──all verified, first tokens known──▶ COMMITTED
      └──────────────┬──────────────────────┘
             FAILED (the peer, the bytes or the clock) or ABANDONED (the request is gone)
                     ▼
             QUARANTINED (a read may still touch the blocks) ──▶ FREED

The decode worker leads and reads; the prefill worker never writes here. How a chunk is read and verified is told in
`reading`; its bytes count only as `VerifiedBlock`s.
The destination blocks belong to the read until its future resolves: only then is `KVQuiesced` reported.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from decode_svc.reading import PROGRESS_CHECK_S, ChunkReader, Grant, Peer
from engine.cache.source import AttemptId, KVEvent, KVFailed, KVFirstTokens, KVLanded, KVQuiesced, KVReady
from engine.request import PromptToken, Request, SampledToken
from kvtransfer.layout import BlockId, KVGroup
from kvtransfer.memory import PoolMemory
from staffetta import failpoint
from staffetta.errors import CorruptBlockError, HandoffFailedError, ProtocolError, StaffettaError
from staffetta.hashing import BlockHash
from staffetta.v1 import prefill_pb2
from worker.codec import prompt_token_from_proto, token_from_proto

log = logging.getLogger(__name__)


class HandoffState(Enum):
    """Where an attempt stands; the diagram above has the moves."""

    OPEN = "open"
    PULLING = "pulling"
    COMMITTED = "committed"
    FAILED = "failed"
    ABANDONED = "abandoned"
    QUARANTINED = "quarantined"
    FREED = "freed"


@dataclass(slots=True)
class HandoffRecord:
    """What is reported of a request's hand-offs, all attempts together. Event loop only; times are monotonic."""

    prefill_worker: str = ""
    transport: str = ""
    num_bytes: int = 0
    num_blocks: int = 0
    num_failed: int = 0
    prefill_cached_tokens: int = 0
    prefill_queue_s: float = 0.0
    first_token_at: float | None = None
    landed_at: float | None = None


@dataclass(slots=True, eq=False)
class Handoff:
    """One attempt. Everything runs on the event loop except the bytes, which move in the reader's thread."""

    attempt_id: AttemptId
    handoff_id: str
    request: Request
    num_held_tokens: int
    peer: Peer
    memory: PoolMemory
    group: KVGroup
    record: HandoffRecord
    timeout_s: float
    """Bounds how long the peer may stand still."""
    limit_s: float
    """Bounds the whole attempt, however alive the peer is."""
    post: Callable[[KVEvent], None]
    """Hands an event to the engine thread."""
    emit: Callable[[tuple[SampledToken, ...]], None]
    """Sends the first token of each choice to the client; must precede their KVFirstTokens."""
    emit_prompt: Callable[[tuple[PromptToken, ...]], None]
    """Sends the prompt's log-probabilities to the client, which may have those of an earlier attempt."""
    may_recover: bool
    """Whether the request goes on when this attempt fails."""

    state: HandoffState = HandoffState.OPEN
    ended_in: HandoffState | None = None
    """The state in which it was committed, failed or given up; None while it runs."""
    has_failed: bool = False
    is_answered: bool = False
    """Whether every choice ended with its first token, so that nothing needs to land."""
    _chunks: deque[prefill_pb2.ChunkReady] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _stopped: "asyncio.Future[StaffettaError | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    _grant: Grant | None = None
    _is_announced: bool = False
    _has_first_tokens: bool = False
    _num_scored: int = 1
    """Leading prompt tokens whose log-probabilities have come; the first has none."""
    _reader: ChunkReader = field(init=False)

    def __post_init__(self) -> None:
        self._reader = ChunkReader(
            self.peer,
            self.memory,
            self.group,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            timeout_s=self.timeout_s,
        )

    # What happens to the attempt

    def on_chunk(self, chunk: prefill_pb2.ChunkReady) -> None:
        """Blocks are final at the peer. The first chunk makes the engine lease this side's blocks."""
        self._chunks.append(chunk)
        self._news.set()
        if not self._is_announced:
            self._is_announced = True
            self.post(KVReady(self.attempt_id))

    def on_prompt_logprobs(self, message: prefill_pb2.PromptLogprobs) -> None:
        """Log-probabilities of the prompt's next tokens go to the client at once."""
        tokens = tuple(prompt_token_from_proto(token) for token in message.tokens)
        first, self._num_scored = self._num_scored, self._num_scored + len(tokens)
        wanted = enumerate(self.request.prompt_token_ids[first : self._num_scored], start=first)
        is_asked = self._num_scored <= self._num_to_score
        if not is_asked or [(token.position, token.token_id) for token in tokens] != list(wanted):
            self.stop(
                ProtocolError(f"log-probabilities came that are not those of the prompt from position {first} on")
            )
            return
        self.emit_prompt(tokens)

    def on_first_tokens(self, message: prefill_pb2.FirstTokens) -> None:
        """The first token of each choice goes to the client at once, KV in flight or not.

        A later attempt's are the same tokens and go to the engine alone, which may have missed the earlier: it drops
        news of an attempt that it has just given up.
        """
        index, num_choices = self.request.first_token_index, len(self.request.choices)
        if [token.index for token in message.tokens] != [index] * num_choices:
            came = f"{len(message.tokens)} first tokens came"
            self.stop(ProtocolError(f"{came} where one of index {index} was due for each of {num_choices} choices"))
            return
        if self._num_scored != self._num_to_score:
            self.stop(ProtocolError(f"first tokens came with {self._num_scored} prompt tokens scored"))
            return
        tokens = tuple(token_from_proto(token) for token in message.tokens)
        if self.record.first_token_at is None:
            self.record.first_token_at = time.monotonic()
            self.record.prefill_cached_tokens = message.cached_tokens
            self.record.prefill_queue_s = message.queue_s
            self.emit(tokens)
        # Known from here on, for the choices that end before the KV has landed.
        self.record.prefill_worker = self.peer.worker_id
        self.is_answered = all(self.request.sampling.finish_reason(token) for token in tokens)
        self._has_first_tokens = True
        self.post(KVFirstTokens(self.attempt_id, tokens))
        self._news.set()

    def on_granted(
        self, *, block_ids: tuple[BlockId, ...], first_block_index: int, chain_hashes: tuple[BlockHash, ...]
    ) -> None:
        """The engine leased the blocks to read into."""
        self._grant = Grant(block_ids, first_block_index, chain_hashes)
        self._news.set()

    def stop(self, error: StaffettaError | None) -> None:
        """Ends the attempt: with an error it has failed, without one it is no longer wanted. Idempotent."""
        if not self._stopped.done():
            self._stopped.set_result(error)

    @property
    def _num_to_score(self) -> int:
        """What `_num_scored` comes to when all has come that is wanted; what was generated before a restart is not."""
        is_asked = self.request.sampling.num_prompt_logprobs is not None
        return len(self.request.prompt_token_ids) - self.request.first_token_index if is_asked else 1

    # The attempt's own course

    async def run(self) -> None:
        """Brings the KV, or says why not; returns when nothing touches the granted blocks any more."""
        work = asyncio.create_task(self._pull_all(), name=f"handoff-{self.handoff_id}")
        try:
            waiting: set[asyncio.Future[Any]] = {work, self._stopped}
            done, _ = await asyncio.wait(waiting, timeout=self.limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self._end(HandoffFailedError(f"the hand-off took longer than {self.limit_s:g} s"))
            elif not work.done():
                self._end(self._stopped.result())
            elif (failure := work.exception()) is not None:
                if not isinstance(failure, StaffettaError):
                    log.error("hand-off %s: unexpected failure", self.handoff_id, exc_info=failure)
                    failure = HandoffFailedError("the hand-off failed on our side")
                self._end(failure)
        finally:
            work.cancel()
            self.peer.release(self.handoff_id)
            await self._quiesce()

    async def _pull_all(self) -> None:
        num_prompt_tokens = len(self.request.prompt_token_ids)
        num_landed = self.num_held_tokens
        while True:
            # At least one chunk: a prompt that is all here has an empty one, and the same course.
            chunk, grant = await self._next_chunk()
            self.state = HandoffState.PULLING
            failpoint.hit("handoff.pulling")
            num_landed = await self._reader.pull(chunk, grant, num_landed)
            if num_landed != chunk.num_ready_tokens or (num_landed == num_prompt_tokens) is not chunk.is_last:
                raise ProtocolError(
                    f"a chunk was announced up to token {chunk.num_ready_tokens} (last: {chunk.is_last}) and reached "
                    f"{num_landed} of {num_prompt_tokens}"
                )
            if chunk.is_last:
                break
            self.post(KVLanded(self.attempt_id, num_landed, is_last=False))
        self.record.landed_at = time.monotonic()
        self.record.transport = self.peer.transport
        self.record.num_bytes, self.record.num_blocks = self._reader.num_bytes, self._reader.num_blocks
        while not self._has_first_tokens:
            await self._wait_for_news()
        self.ended_in = self.state = HandoffState.COMMITTED
        self.post(KVLanded(self.attempt_id, num_landed, is_last=True))
        failpoint.hit("handoff.committed")

    async def _next_chunk(self) -> tuple[prefill_pb2.ChunkReady, Grant]:
        while not self._chunks:
            await self._wait_for_news()
        while self._grant is None:
            # Our own pool is full: the peer's lease runs, not its clock.
            self._news.clear()
            await self._news.wait()
        return self._chunks.popleft(), self._grant

    async def _wait_for_news(self) -> None:
        """Waits for the peer. Raises HandoffFailedError when its engine has not advanced for `timeout_s`."""
        started = time.monotonic()
        self._news.clear()
        while not self._news.is_set():
            try:
                async with asyncio.timeout(PROGRESS_CHECK_S):
                    await self._news.wait()
            except TimeoutError:
                quiet_s = time.monotonic() - max(started, self.peer.last_progress())
                if quiet_s > self.timeout_s:
                    raise HandoffFailedError(
                        f"{self.peer.worker_id} made no progress for {quiet_s:.1f} s, the limit is {self.timeout_s:g} s"
                    ) from None

    # Endings

    def _end(self, error: StaffettaError | None) -> None:
        self.ended_in = self.state
        if not self.is_answered:
            self.record.prefill_worker = ""
        if error is None:
            self.state = HandoffState.ABANDONED
            return
        corrupt = "corrupt block; " if isinstance(error, CorruptBlockError) else ""
        log.warning(
            "request %s: hand-off from %s failed while %s: %s%s",
            self.request.request_id, self.peer.worker_id, self.state.value, corrupt, error.message,
        )  # fmt: skip
        self.state = HandoffState.FAILED
        self.has_failed = True
        self.record.num_failed += 1
        final = None if self.may_recover else HandoffFailedError(f"the hand-off failed: {error.message}")
        self.post(KVFailed(self.attempt_id, final))

    async def _quiesce(self) -> None:
        """Waits until no read touches the granted blocks any more, and tells the engine so."""
        if self.state is HandoffState.COMMITTED:
            return
        if outstanding := self._reader.outstanding():
            self.state = HandoffState.QUARANTINED
            await self._reader.quiesce(outstanding)
        self.state = HandoffState.FREED
        if self._grant is not None:
            self.post(KVQuiesced(self.attempt_id))
