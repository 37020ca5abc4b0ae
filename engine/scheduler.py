"""Keeps the queues, and carries plans out: `schedule`, `apply`, `commit`. Engine thread only; no I/O, no tensors.

`schedule` may be called between `apply` and `commit` of the step before: the token being drawn counts as a placeholder.
Parts of such a plan that the commit made pointless are dropped by `apply`.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import PrefixCache
from engine.planning import EngineLimits, PlannedLease, PlannedSlice, Snapshot, StepPlan, plan_step
from engine.request import RequestId
from engine.sequence import OrderKey, Sequence, SequenceState
from engine.step import Draw, SequenceSlice, SliceResult
from staffetta.errors import StepFailedError

SliceOutcome = SliceResult | StepFailedError


class Committed(NamedTuple):
    """A sequence that a step computed, and what came of it."""

    sequence: Sequence
    outcome: SliceOutcome


class _InFlight(NamedTuple):
    sequence: Sequence
    start: int
    end: int
    num_placeholders: int


def _order(sequence: Sequence) -> OrderKey:
    return sequence.order


class Scheduler:
    """Sequences that wait for their turn or run, both in order."""

    def __init__(
        self, pool: BlockPool, prefix: PrefixCache, limits: EngineLimits, *, clock: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._prefix = prefix
        self._limits = limits
        self._clock = clock
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._num_held_tokens: dict[RequestId, int] = {}
        """What the source was told is here already, for the sequences of `_waiting` whose KV waits elsewhere."""
        self._queued: dict[RequestId, Sequence] = {}
        """Both queues, by id."""
        self._in_flight: list[_InFlight] = []

    def enqueue(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turn to be computed here."""
        sequence.state = SequenceState.WAITING
        self._insert(self._waiting, sequence)

    def enqueue_to_receive(self, sequence: Sequence, *, num_held_tokens: int) -> None:
        """Lets a sequence wait for blocks for KV that exists elsewhere, beyond the first `num_held_tokens`."""
        self._num_held_tokens[sequence.request_id] = num_held_tokens
        self._insert(self._waiting, sequence)

    def start(self, sequence: Sequence) -> None:
        """Lets a sequence that holds blocks run."""
        sequence.state = SequenceState.RUNNING
        self._insert(self._running, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is; its blocks stay with it."""
        for queue in (self._running, self._waiting):
            index = bisect.bisect_left(queue, sequence.order, key=_order)
            if index < len(queue) and queue[index] is sequence:
                del queue[index]
        self._queued.pop(sequence.request_id, None)
        self._num_held_tokens.pop(sequence.request_id, None)

    def snapshot(self, *, num_granted: int) -> Snapshot:
        """What `schedule` decides from."""
        return Snapshot(
            limits=self._limits,
            running=tuple(self._running),
            waiting=tuple(self._waiting),
            num_granted=num_granted,
            num_held_tokens=self._num_held_tokens,
            pool=self._pool,
            prefix=self._prefix,
        )

    def schedule(self, snapshot: Snapshot) -> StepPlan:
        """Decides the next step; changes nothing."""
        return plan_step(snapshot)

    def apply(self, plan: StepPlan) -> tuple[SequenceSlice, ...]:
        """Takes the plan's blocks and counts its tokens as computed. The slices are to be run, then committed."""
        if self._in_flight:
            raise IntegrityError("the step before is not committed")
        queued = self._queued
        for request_id in plan.preempted:
            if (victim := queued.get(request_id)) is not None:
                self._preempt(victim)
        leases = [(queued[lease.request_id], lease) for lease in plan.leases if lease.request_id in queued]
        slices = [(queued[part.request_id], part) for part in plan.slices if part.request_id in queued]
        # All shares before any allocation, which might evict what another admission of this plan shares.
        for sequence, lease in leases:
            sequence.lease.share(lease.shared)
        for sequence, part in slices:
            sequence.lease.share(part.shared)
        for sequence, lease in leases:
            self._lease_to_receive(sequence, lease)
        return tuple([self._dispatch(sequence, part) for sequence, part in slices])

    def commit(self, outcomes: list[SliceOutcome]) -> list[Committed]:
        """Ends the step in flight: one outcome for each slice, in order. Blocks that became full are published."""
        in_flight, self._in_flight = self._in_flight, []
        committed: list[Committed] = []
        for (sequence, start, end, num_placeholders), outcome in zip(in_flight, outcomes, strict=True):
            sequence.num_placeholders -= num_placeholders
            if isinstance(outcome, StepFailedError):
                sequence.num_computed_tokens = start
            else:
                sequence.count_computed(start, end)
                sequence.publish(self._prefix, num_final_tokens=end)
            committed.append(Committed(sequence, outcome))
        return committed

    def rollback(self) -> None:
        """Undoes the counting of the step in flight; blocks that it took stay with their sequences."""
        in_flight, self._in_flight = self._in_flight, []
        for sequence, start, _end, num_placeholders in in_flight:
            sequence.num_placeholders -= num_placeholders
            sequence.num_computed_tokens = start

    def check_integrity(self) -> None:
        """Raises IntegrityError unless queues and sequences agree. Between steps only."""
        for name, queue in (("running", self._running), ("waiting", self._waiting)):
            if sorted(queue, key=_order) != queue:
                raise IntegrityError(f"the {name} queue is out of order")
        for sequence in self._running:
            if sequence.state is not SequenceState.RUNNING or not sequence.lease or sequence.num_placeholders:
                raise IntegrityError(f"{sequence.request_id} runs as {sequence}")
        for sequence in self._waiting:
            is_told = sequence.request_id in self._num_held_tokens
            wanted = SequenceState.AWAITING_KV if is_told else SequenceState.WAITING
            if sequence.state is not wanted or (is_told and sequence.lease):
                raise IntegrityError(f"{sequence.request_id} waits as {sequence}")

    def _insert(self, queue: list[Sequence], sequence: Sequence) -> None:
        if sequence.request_id in self._queued:
            raise IntegrityError(f"{sequence.request_id} is queued already")
        self._queued[sequence.request_id] = sequence
        bisect.insort(queue, sequence, key=_order)

    def _preempt(self, victim: Sequence) -> None:
        self.remove(victim)
        victim.release_blocks()
        victim.num_preemptions += 1
        self.enqueue(victim)

    def _lease_to_receive(self, sequence: Sequence, lease: PlannedLease) -> None:
        self.remove(sequence)
        sequence.lease.extend(lease.num_new_blocks)
        sequence.num_published_blocks = len(lease.shared)
        sequence.num_computed_tokens = len(lease.shared) * sequence.hasher.block_size

    def _dispatch(self, sequence: Sequence, part: PlannedSlice) -> SequenceSlice:
        if sequence.state is SequenceState.WAITING:
            self._join(sequence, part)
        sequence.lease.extend(part.num_new_blocks)
        end = part.start + part.num_tokens
        first_written = sequence.lease.table[part.start // sequence.hasher.block_size]
        if self._pool.is_published(first_written):
            raise IntegrityError(f"{sequence.request_id} would write into the published block {first_written}")
        is_sampling = end == sequence.num_known_tokens
        token_slice = SequenceSlice(
            request_id=sequence.request_id,
            token_ids=tuple(sequence.token_ids[part.start : end]),
            start=part.start,
            block_ids=sequence.block_ids(end),
            draw=Draw(sequence.request.sampling, sequence.next_output_index) if is_sampling else None,
        )
        sequence.num_computed_tokens = end
        sequence.num_placeholders = int(is_sampling)
        self._in_flight.append(_InFlight(sequence, part.start, end, int(is_sampling)))
        return token_slice

    def _join(self, sequence: Sequence, part: PlannedSlice) -> None:
        self.remove(sequence)
        self.start(sequence)
        if part.shared:
            sequence.num_published_blocks = len(part.shared)
        if sequence.started_at is None:
            sequence.started_at = self._clock()
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(part.start, sequence.num_prompt_tokens)
