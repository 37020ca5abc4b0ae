"""Follows sequences whose KV comes from elsewhere, from the first `lookup` to the last `KVQuiesced`. Engine thread
only.

Each attempt goes BEGUN → READY → GRANTED → LANDED. It holds blocks from GRANTED on. Whatever ends an attempt before all
has landed quarantines the blocks that a read may still touch; they are freed by nothing but the source's word that no
read is left.
"""

import logging
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import PrefixCache
from engine.cache.source import AttemptId, KVEvent, KVFailed, KVFirstTokens, KVLanded, KVQuiesced, KVReady, KVSource
from engine.planning import PlannedLease
from engine.request import FinishReason, RequestId
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState
from staffetta.errors import InternalError, StaffettaError

log = logging.getLogger(__name__)

MAX_SHRUNK_RESTARTS = 3
"""Attempts that may start over because the local prefix shrank; then the prompt is computed here."""


class Ending(NamedTuple):
    """Choices of a sequence that end. When they end while its KV is on the way, they are not open any more, and with
    the last one the attempt has ended, too."""

    sequence: Sequence
    choices: tuple[int, ...]
    finish_reason: FinishReason
    error: StaffettaError | None = None


class News(NamedTuple):
    """What the source's events mean for others than the attempts.

    Sequences of `complete` have all KV and their choices' first tokens: they are to be forked.
    """

    num_events: int
    endings: list[Ending]
    complete: list[Sequence]


class AttemptStage(Enum):
    """How far an attempt is."""

    BEGUN = "begun"
    READY = "ready"
    GRANTED = "granted"
    LANDED = "landed"
    """All KV is here; only first tokens are missing."""


@dataclass(slots=True, eq=False)
class _Attempt:
    attempt_id: AttemptId
    sequence: Sequence
    num_held_tokens: int
    """Leading tokens that the source was told are here already."""
    stage: AttemptStage = AttemptStage.BEGUN
    is_quiesced: bool = False


class AwaitingSequences:
    """All attempts that are under way, at most one for each sequence."""

    def __init__(self, source: KVSource, scheduler: Scheduler, pool: BlockPool, prefix: PrefixCache) -> None:
        self._source = source
        self._scheduler = scheduler
        self._pool = pool
        self._prefix = prefix
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._by_request: dict[RequestId, _Attempt] = {}
        self._complete: list[Sequence] = []
        self._next_attempt_id = 1

    @property
    def num_granted(self) -> int:
        """Sequences that hold blocks for KV on the way."""
        return sum(1 for a in self._attempts.values() if a.stage in (AttemptStage.GRANTED, AttemptStage.LANDED))

    def consult(self, sequence: Sequence) -> Ending | None:
        """Asks the source about a sequence that is in no queue: it then waits for KV, or for its turn here."""
        if sequence.is_scoring:
            sequence.release_blocks()  # what landed brings no logits: should it come to that, all is computed here
        num_cached = max(self._num_matched(sequence), sequence.num_computed_tokens)
        num_known = sequence.num_prompt_tokens + sequence.has_first_tokens
        try:
            offer = self._source.lookup(sequence.request, num_cached_tokens=num_cached, num_known_tokens=num_known)
        except StaffettaError as error:
            return _error_ending(sequence, error)
        except Exception:
            log.exception("request %s: looking for KV elsewhere raised", sequence.request_id)
            return _error_ending(sequence, InternalError("looking for the prompt's KV failed"))
        if offer is None:
            self._compute_here(sequence)
            return None
        # It waits with nothing held: what landed before is in the prefix cache, and others may need the room.
        sequence.release_blocks()
        attempt_id = AttemptId(self._next_attempt_id)
        self._next_attempt_id += 1
        attempt = _Attempt(attempt_id, sequence, self._num_matched(sequence))
        self._attempts[attempt_id] = self._by_request[sequence.request_id] = attempt
        sequence.state = SequenceState.AWAITING_KV
        self._source.begin(attempt_id, sequence.request, num_cached_tokens=attempt.num_held_tokens)
        return None

    def poll(self, *, now: float) -> News:
        """Takes the source's news in."""
        events = self._source.poll()
        endings = [ending for event in events for ending in self._handle(event, now=now)]
        complete, self._complete = self._complete, []
        return News(len(events), endings, complete)

    def restart_shrunk(self) -> list[Ending]:
        """Starts attempts over that wait for blocks while the prefix that the source was told of has been evicted."""
        endings: list[Ending] = []
        for attempt in [a for a in self._attempts.values() if a.stage is AttemptStage.READY]:
            sequence = attempt.sequence
            num_told = attempt.num_held_tokens // sequence.hasher.block_size
            if len(self._prefix.match(sequence.chain(num_told))) == num_told:
                continue
            self.abandon(sequence)
            sequence.num_shrunk += 1
            if sequence.num_shrunk > MAX_SHRUNK_RESTARTS:
                self._compute_here(sequence)
            elif (ending := self.consult(sequence)) is not None:
                endings.append(ending)
        return endings

    def grant(self, lease: PlannedLease, *, now: float) -> None:
        """Hands a sequence's newly leased blocks to the source."""
        attempt = self._by_request[lease.sequence_id.request_id]
        sequence = attempt.sequence
        attempt.stage = AttemptStage.GRANTED
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = attempt.num_held_tokens
        if sequence.started_at is None:
            sequence.started_at = now
        first = len(lease.shared)
        self._source.grant(
            attempt.attempt_id,
            block_ids=tuple(sequence.lease.table)[first:],
            first_block_index=first,
            chain_hashes=tuple(sequence.chain(sequence.num_prompt_tokens // sequence.hasher.block_size)[first:]),
        )

    def abandon(self, sequence: Sequence) -> None:
        """Gives up a sequence's attempt, if it has one. Blocks that landed stay the sequence's own."""
        attempt = self._by_request.get(sequence.request_id)
        if attempt is not None:
            self._end(attempt)
            self._source.abandon(attempt.attempt_id)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless attempts, sequences and quarantine agree."""
        if {a.sequence.request_id: a for a in self._attempts.values()} != self._by_request:
            raise IntegrityError("attempts by id and by request differ")
        for attempt in self._attempts.values():
            is_holding = attempt.stage in (AttemptStage.GRANTED, AttemptStage.LANDED)
            is_leased = bool(attempt.sequence.lease)
            if attempt.sequence.state is not SequenceState.AWAITING_KV or is_holding is not is_leased:
                raise IntegrityError(f"{attempt} does not fit its sequence")
        if not self._pool.quarantine_keys().isdisjoint(self._attempts):
            raise IntegrityError("a live attempt has blocks in quarantine")

    def _num_matched(self, sequence: Sequence) -> int:
        """Leading prompt tokens that the prefix cache holds; what is to be scored must not take them from there."""
        if sequence.is_scoring:
            return 0
        size = sequence.hasher.block_size
        return len(self._prefix.match(sequence.chain(sequence.num_prompt_tokens // size))) * size

    def _handle(self, event: KVEvent, *, now: float) -> list[Ending]:
        attempt = self._attempts.get(event.attempt_id)
        if attempt is None:
            # Late news of an attempt given up. Two kinds say that nothing writes any more; the rest is dropped.
            if isinstance(event, KVQuiesced) or (isinstance(event, KVLanded) and event.is_last):
                self._pool.release_quarantine(event.attempt_id)
            return []
        match event:
            case KVReady():
                self._on_ready(attempt)
            case KVLanded():
                return self._on_landed(attempt, event)
            case KVFirstTokens():
                return self._on_first_tokens(attempt, event, now=now)
            case KVFailed():
                return self._on_failed(attempt, event)
            case KVQuiesced():
                attempt.is_quiesced = True
        return []

    def _on_ready(self, attempt: _Attempt) -> None:
        if attempt.stage is AttemptStage.BEGUN:
            attempt.stage = AttemptStage.READY
            self._scheduler.enqueue_to_receive(attempt.sequence, num_held_tokens=attempt.num_held_tokens)

    def _on_landed(self, attempt: _Attempt, event: KVLanded) -> list[Ending]:
        sequence = attempt.sequence
        is_in_order = sequence.num_computed_tokens <= event.num_tokens <= sequence.num_prompt_tokens
        if attempt.stage is not AttemptStage.GRANTED or not is_in_order:
            return self._contradiction(attempt, event)
        sequence.num_computed_tokens = event.num_tokens
        sequence.max_computed_tokens = max(sequence.max_computed_tokens, event.num_tokens)
        sequence.publish(self._prefix, num_final_tokens=event.num_tokens)
        if event.is_last:
            attempt.stage = AttemptStage.LANDED
            self._run_if_complete(attempt)
        return []

    def _on_first_tokens(self, attempt: _Attempt, event: KVFirstTokens, *, now: float) -> list[Ending]:
        sequence, tokens = attempt.sequence, event.tokens
        if sequence.has_first_tokens:
            return []  # an earlier attempt brought them
        index = sequence.request.first_token_index
        if [token.index for token in tokens] != [index] * len(sequence.choices):
            return self._contradiction(attempt, event)
        if sequence.is_unforked:
            sequence.learn_first_tokens(tokens, now=now)
        else:
            sequence.append(tokens[0], now=now)
        sequence.num_scored_tokens = sequence.num_prompt_tokens
        finish_reason = sequence.request.sampling.finish_reason
        endings = [
            Ending(sequence, (choice,), reason)
            for choice, token in zip(sequence.choices, tokens, strict=True)
            if choice in sequence.open_choices and (reason := finish_reason(token)) is not None
        ]
        sequence.close([choice for ending in endings for choice in ending.choices])
        if not sequence.open_choices:
            # At once, not with the sequence: the same poll may hold more news of this attempt, and an ending is final.
            self.abandon(sequence)
        else:
            self._run_if_complete(attempt)
        return endings

    def _run_if_complete(self, attempt: _Attempt) -> None:
        # With all KV and nothing to compute, first tokens are the source's to bring: they must not be drawn here too.
        sequence = attempt.sequence
        if attempt.stage is AttemptStage.LANDED and sequence.has_first_tokens:
            self._end(attempt)
            if sequence.is_unforked:
                self._complete.append(sequence)
            else:
                self._scheduler.start(sequence)

    def _on_failed(self, attempt: _Attempt, event: KVFailed) -> list[Ending]:
        self._end(attempt)
        if event.error is not None:
            return [_error_ending(attempt.sequence, event.error)]
        attempt.sequence.state = SequenceState.WAITING
        ending = self.consult(attempt.sequence)
        return [] if ending is None else [ending]

    def _contradiction(self, attempt: _Attempt, event: KVEvent) -> list[Ending]:
        """Ends a request whose source said what cannot be; what a peer sent may be behind it."""
        sequence = attempt.sequence
        log.error("request %s: the KV source says %s of %s", sequence.request_id, event, attempt)
        self.abandon(sequence)
        return [_error_ending(sequence, InternalError("the prompt's KV did not arrive in order"))]

    def _end(self, attempt: _Attempt) -> None:
        """Forgets the attempt. Its sequence keeps full blocks that landed; what a read may touch goes to quarantine."""
        sequence = attempt.sequence
        del self._attempts[attempt.attempt_id]
        del self._by_request[sequence.request_id]
        if attempt.stage is AttemptStage.READY:
            self._scheduler.remove(sequence)
        if attempt.stage is AttemptStage.GRANTED:
            rest = sequence.keep_blocks(sequence.num_computed_tokens // sequence.hasher.block_size)
            if attempt.is_quiesced:
                rest.release()
            else:
                rest.quarantine(attempt.attempt_id)

    def _compute_here(self, sequence: Sequence) -> None:
        if sequence.lease and sequence.num_pending_tokens == 0:
            # Everything landed but the token. Its logits need the last position again, and never in a published block.
            sequence.keep_blocks((sequence.num_known_tokens - 1) // sequence.hasher.block_size).release()
        self._scheduler.enqueue(sequence)


def _error_ending(sequence: Sequence, error: StaffettaError) -> Ending:
    return Ending(sequence, sequence.open_choices, FinishReason.ERROR, error)
