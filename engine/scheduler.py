"""Keeps the queues, and carries plans out: `schedule`, `apply`, `commit`. Engine thread only; no I/O, no tensors.

One step after another: nothing is scheduled between `apply` and `commit`. A step that is begun in between (`ahead`) was
not scheduled; it is planned from the sequences in flight, whose token being drawn counts as a placeholder.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import PrefixCache
from engine.pacing import StepPacer
from engine.planning import EngineLimits, PlannedLease, PlannedSlice, Snapshot, StepPlan, plan_step
from engine.sequence import OrderKey, Sequence, SequenceId, SequenceState
from engine.slicing import slice_of
from engine.step import BlockCopy, SequenceSlice, SliceResult
from kvtransfer.layout import BlockId
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
    replaced: BlockLease | None
    """The block that the slice copied; held until the step is over, so that a part of it may be run again."""


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
        self._num_held_tokens: dict[SequenceId, int] = {}
        """What the source was told is here already, for the sequences of `_waiting` whose KV waits elsewhere."""
        self._queued: dict[SequenceId, Sequence] = {}
        """Both queues, by id."""
        self._in_flight: list[_InFlight] = []
        self.num_copied_blocks = 0
        """Blocks copied since the start, because a choice wrote where others still read."""

    def enqueue(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turn to be computed here."""
        sequence.state = SequenceState.WAITING
        self._insert(self._waiting, sequence)

    def enqueue_to_receive(self, sequence: Sequence, *, num_held_tokens: int) -> None:
        """Lets a sequence wait for blocks for KV that exists elsewhere, beyond the first `num_held_tokens`."""
        self._num_held_tokens[sequence.sequence_id] = num_held_tokens
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
        self._queued.pop(sequence.sequence_id, None)
        self._num_held_tokens.pop(sequence.sequence_id, None)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that run, in order."""
        return tuple(self._running)

    @property
    def in_flight(self) -> tuple[Sequence, ...]:
        """Those that the applied step has slices of, in the slices' order."""
        return tuple([part.sequence for part in self._in_flight])

    def has_joining(self, *, num_going_on: int) -> bool:
        """Whether a sequence waits for its turn, or for blocks, and there is a place beside so many that go on.

        One that waits for its receiver's grant does not.
        """
        if num_going_on >= self._limits.max_sequences:
            return False
        return any(each.state is SequenceState.AWAITING_KV or not each.is_paused for each in self._waiting)

    def snapshot(self, pacer: StepPacer, *, num_granted: int) -> Snapshot:
        """What `schedule` decides from."""
        return Snapshot(
            limits=self._limits,
            running=tuple(self._running),
            waiting=tuple(self._waiting),
            num_granted=num_granted,
            pacer=pacer,
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
        for sequence_id in plan.preempted:
            if (victim := queued.get(sequence_id)) is not None:
                self._preempt(victim)
        leases = [(queued[lease.sequence_id], lease) for lease in plan.leases if lease.sequence_id in queued]
        slices = [(queued[part.sequence_id], part) for part in plan.slices if part.sequence_id in queued]
        # All shares before any allocation, which might evict what another admission of this plan shares.
        for sequence, lease in leases:
            sequence.lease.share(lease.shared)
        for sequence, part in slices:
            sequence.lease.share(part.shared)
        for sequence, lease in leases:
            self._lease_to_receive(sequence, lease)
        # All copies before any write, which is in place once the others who held the block have theirs.
        replaced = {
            part.sequence_id: sequence.lease.replace(part.start // sequence.hasher.block_size)
            for sequence, part in slices
            if part.copied is not None
        }
        given_up = [lease.table[0] for lease in replaced.values()]
        return tuple(
            [
                self._dispatch(sequence, part, replaced.get(part.sequence_id), given_up=given_up)
                for sequence, part in slices
            ]
        )

    def commit(self, outcomes: list[SliceOutcome]) -> list[Committed]:
        """Ends the step in flight: one outcome for each slice, in order. Blocks that became full are published."""
        in_flight, self._in_flight = self._in_flight, []
        committed: list[Committed] = []
        for (sequence, start, end, num_placeholders, replaced), outcome in zip(in_flight, outcomes, strict=True):
            sequence.num_placeholders -= num_placeholders
            if replaced is not None:
                replaced.release()
            if isinstance(outcome, StepFailedError):
                sequence.num_computed_tokens = start
            else:
                self.num_copied_blocks += replaced is not None
                sequence.count_computed(start, end)
                sequence.publish(self._prefix, num_final_tokens=end)
            committed.append(Committed(sequence, outcome))
        return committed

    def rollback(self) -> None:
        """Undoes the counting of the step in flight, and its copies; new blocks that it took stay where they are."""
        in_flight, self._in_flight = self._in_flight, []
        for sequence, start, _end, num_placeholders, replaced in in_flight:
            sequence.num_placeholders -= num_placeholders
            sequence.num_computed_tokens = start
            if replaced is not None:
                sequence.lease.restore(start // sequence.hasher.block_size, replaced)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless queues and sequences agree. Between steps only."""
        for name, queue in (("running", self._running), ("waiting", self._waiting)):
            if sorted(queue, key=_order) != queue:
                raise IntegrityError(f"the {name} queue is out of order")
        for sequence in self._running:
            if sequence.state is not SequenceState.RUNNING or not sequence.lease or sequence.num_placeholders:
                raise IntegrityError(f"{sequence.sequence_id} runs as {sequence}")
        for sequence in self._waiting:
            is_told = sequence.sequence_id in self._num_held_tokens
            wanted = SequenceState.AWAITING_KV if is_told else SequenceState.WAITING
            if sequence.state is not wanted or (is_told and sequence.lease):
                raise IntegrityError(f"{sequence.sequence_id} waits as {sequence}")

    def _insert(self, queue: list[Sequence], sequence: Sequence) -> None:
        if sequence.sequence_id in self._queued:
            raise IntegrityError(f"{sequence.sequence_id} is queued already")
        self._queued[sequence.sequence_id] = sequence
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

    def _dispatch(
        self, sequence: Sequence, part: PlannedSlice, replaced: BlockLease | None, *, given_up: list[BlockId]
    ) -> SequenceSlice:
        """Takes a slice's blocks and counts its tokens. `replaced` is the reference to the block that it copies.

        `given_up` has each reference that slices of this step keep to a block only in order to copy it.
        """
        if sequence.state is SequenceState.WAITING:
            self._join(sequence, part)
        sequence.lease.extend(part.num_new_blocks)
        end = part.start + part.num_tokens
        first_written = sequence.lease.table[part.start // sequence.hasher.block_size]
        if self._pool.is_published(first_written):
            raise IntegrityError(f"{sequence.sequence_id} would write into the published block {first_written}")
        if self._pool.num_references(first_written) - given_up.count(first_written) != 1:
            raise IntegrityError(f"{sequence.sequence_id} would write into block {first_written}, which others hold")
        copy = None if replaced is None else BlockCopy(replaced.table[0], first_written)
        token_slice = slice_of(sequence, part.start, end, copy)
        sequence.num_computed_tokens = end
        sequence.num_placeholders = int(token_slice.draw is not None)
        self._in_flight.append(_InFlight(sequence, part.start, end, sequence.num_placeholders, replaced))
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
