"""Decides what the next step computes: values in, a plan out. No I/O, no tensors, nothing is changed here.

There is one rule: every sequence has tokens known and tokens computed, and a step gives each part of the token budget
so that computed catches up with known. Prefill, chunks, prefix hits, recomputing and decode are the same case. Blocks
go first to sequences that run, then to those that wait, first come first served within a priority; nobody overtakes
whoever waits for blocks.
"""

import math
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final, NamedTuple

from engine.cache.pool import BlockPool, BlockState
from engine.cache.prefix import PrefixCache
from engine.pacing import MOST_PROMPTS, StepPacer, WaitingPrompt
from engine.sequence import Sequence, SequenceId, SequenceState
from engine.sharing import SharedBlocks
from kvtransfer.layout import BlockId

_MOST_LOOKED_UP: Final = 4096
"""Tokens of a prompt whose cached beginning counts before its turn to join: hashing a longer one takes milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of an engine: `max_batch_tokens` and `max_sequences` of a step, `max_requests` of what is held at once.

    `max_requests` counts `Request.num_places`. `max_slowdown` is how many times as long a step that generates may take
    for a long prompt; see `engine.pacing`.
    """

    max_model_len: int
    max_batch_tokens: int
    max_sequences: int
    max_requests: int
    prefix_caching: bool
    max_slowdown: float = math.inf

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_batch_tokens", "max_sequences", "max_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needs at least 1")


class PlannedSlice(NamedTuple):
    """Compute `num_tokens` tokens from position `start` on.

    A sequence that joins first shares the blocks `shared`, which the prefix cache holds; then `num_new_blocks` are
    taken. `copied` is the block that the slice would write into while others hold it: it is copied into one more block,
    which takes its place.
    """

    sequence_id: SequenceId
    start: int
    num_tokens: int
    shared: tuple[BlockId, ...]
    num_new_blocks: int
    copied: BlockId | None = None


class PlannedLease(NamedTuple):
    """Lease a prompt's blocks for KV that waits elsewhere: `shared` from the prefix cache, the rest new."""

    sequence_id: SequenceId
    shared: tuple[BlockId, ...]
    num_new_blocks: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does, in this order: preempt, share, take new blocks and copies, compute.

    A plan that preempts admits nobody.
    """

    preempted: tuple[SequenceId, ...] = ()
    leases: tuple[PlannedLease, ...] = ()
    slices: tuple[PlannedSlice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a plan is made from. Sequences, pool and prefix cache are only read.

    `running` and `waiting` are in order; `waiting` holds sequences to compute here (WAITING) and such whose KV waits
    elsewhere (AWAITING_KV). `num_granted` sequences receive KV now and will run. `pacer` says what a step may compute
    of prompts.
    """

    limits: EngineLimits
    running: tuple[Sequence, ...]
    waiting: tuple[Sequence, ...]
    num_granted: int
    pacer: StepPacer
    num_held_tokens: dict[SequenceId, int]
    pool: BlockPool
    prefix: PrefixCache


def plan_step(snapshot: Snapshot) -> StepPlan:
    """The next step. An empty plan means that nothing can go on before something happens outside."""
    return _Planner(snapshot).plan()


def _is_running(sequence: Sequence) -> bool:
    return sequence.state is SequenceState.RUNNING and sequence.is_computable


class _Blocked(NamedTuple):
    """A sequence that lacks blocks: it needs `num_blocks`, and maybe one to copy `written` into."""

    sequence: Sequence
    num_blocks: int
    written: BlockId | None = None


class _Planner:
    """The working state of one `plan_step`: what is left of budget and pool after the decisions so far."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._limits = snapshot.limits
        self._pool = snapshot.pool
        self._num_tokens_left = snapshot.limits.max_batch_tokens
        self._num_blocks_left = snapshot.pool.num_available
        self._slices: dict[SequenceId, PlannedSlice] = {}
        self._leases: list[PlannedLease] = []
        self._preempted: dict[SequenceId, Sequence] = {}
        self._claimed: set[BlockId] = set()
        """Cached blocks that a planned admission shares: no longer available, but shared a second time for nothing."""
        self._cached_blocks: dict[SequenceId, tuple[BlockId, ...]] = {}
        """What `_cached` has found."""
        self._shared = SharedBlocks(snapshot.pool)
        self._blocked: _Blocked | None = None
        """The first sequence that lacks blocks."""

    def plan(self) -> StepPlan:
        computable = [sequence for sequence in self._snapshot.running if sequence.is_computable]
        prompts = [sequence for sequence in computable if sequence.num_pending_tokens > 1]
        # One-token sequences first: a long prompt must not hold up the streams of others.
        for sequence in computable if not prompts else [each for each in computable if each.num_pending_tokens == 1]:
            self._continue(sequence)
        has_streams = any(not each.is_prefill and each.sequence_id in self._slices for each in computable)
        self._pace(prompts, num_streams=len(self._slices) if has_streams else 0)
        for sequence in prompts:
            self._continue(sequence)
        if self._blocked is None and not self._preempted:
            self._admit(len(computable) + self._snapshot.num_granted)
        if self._blocked is not None and not (self._slices or self._leases or self._preempted):
            self._take_from_idle(self._blocked)
        for sequence_id, copied in self._shared.copies().items():
            self._slices[sequence_id] = self._slices[sequence_id]._replace(copied=copied)
        return StepPlan(tuple(self._preempted), tuple(self._leases), tuple(self._slices.values()))

    def _pace(self, running: list[Sequence], *, num_streams: int) -> None:
        """Keeps what a step computes of prompts to what the pacer allows beside `num_streams` tokens of streams.

        The prompts of `running` count, and of those that wait as many as have a place.
        """
        if math.isinf(self._limits.max_slowdown):
            return
        waiting = (each for each in self._snapshot.waiting if each.state is SequenceState.WAITING)
        joining = (each for each in waiting if each.num_pending_tokens > 1 and not each.is_paused)
        num_counted = min(self._limits.max_sequences - len(self._slices), MOST_PROMPTS)
        prompts = [self._waiting_prompt(each) for each in islice(chain(running, joining), num_counted)]
        if prompts:
            budget = self._snapshot.pacer.num_prompt_tokens(num_streams=num_streams, prompts=prompts)
            self._num_tokens_left = min(self._num_tokens_left, budget)

    def _waiting_prompt(self, sequence: Sequence) -> WaitingPrompt:
        num_left = sequence.num_pending_tokens
        if num_left <= _MOST_LOOKED_UP:
            num_left -= len(self._cached(sequence)) * sequence.hasher.block_size
        is_new = sequence.state is SequenceState.WAITING
        num_tokens = num_left if is_new else sequence.num_known_tokens - (sequence.num_cached_tokens or 0)
        return WaitingPrompt(num_tokens, num_left)

    def _cached(self, sequence: Sequence) -> tuple[BlockId, ...]:
        """Blocks of the prefix cache that a sequence would share if it joined now."""
        if sequence.lease or sequence.is_scoring:
            return ()
        if sequence.sequence_id not in self._cached_blocks:
            # At least one token is computed, for its logits, and nothing in a published block: so a whole block is.
            num_sharable = (sequence.num_known_tokens - 1) // sequence.hasher.block_size
            self._cached_blocks[sequence.sequence_id] = self._snapshot.prefix.match(sequence.chain(num_sharable))
        return self._cached_blocks[sequence.sequence_id]

    def _continue(self, sequence: Sequence) -> None:
        """Gives a running sequence its part, at the cost of sequences that come after it when the pool is short."""
        if not self._has_room_for_slice() or sequence.sequence_id in self._preempted:
            return
        start = sequence.num_computed_tokens
        num_tokens = self._chunk(sequence, start)
        num_new = max(0, sequence.num_blocks_for(start + num_tokens) - sequence.num_leased_blocks)
        written = self._shared.written_by(sequence)
        while num_new + self._shared.cost_of_write(written) > self._num_blocks_left:
            victim = self._last_holder_after(sequence)
            if victim is None:
                # It keeps what it has and waits: whoever comes before it may still take it.
                self._blocked = self._blocked or _Blocked(sequence, num_new, written)
                return
            self._preempt(victim)
        if written is not None:
            self._num_blocks_left -= self._shared.cost_of_write(written)
            self._shared.write(sequence, written)
        self._add(PlannedSlice(sequence.sequence_id, start, num_tokens, (), num_new))

    def _admit(self, num_active: int) -> None:
        """Lets waiting sequences join, in order, until one lacks blocks or no place is left."""
        for sequence in self._snapshot.waiting:
            if num_active >= self._limits.max_sequences:
                return
            if sequence.state is SequenceState.AWAITING_KV:
                is_admitted = self._admit_to_receive(sequence)
            elif sequence.is_paused or not self._has_room_for_slice():
                continue  # nothing to compute now; a lease for KV from elsewhere needs no token budget
            else:
                is_admitted = self._admit_to_compute(sequence)
            if not is_admitted:
                return
            num_active += 1

    def _admit_to_receive(self, sequence: Sequence) -> bool:
        num_shared = self._snapshot.num_held_tokens[sequence.sequence_id] // sequence.hasher.block_size
        shared = self._snapshot.prefix.match(sequence.chain(num_shared))
        num_new = sequence.num_prompt_blocks - len(shared)
        if not self._claim(sequence, shared, num_new):
            return False
        self._leases.append(PlannedLease(sequence.sequence_id, shared, num_new))
        return True

    def _admit_to_compute(self, sequence: Sequence) -> bool:
        shared = self._cached(sequence)
        start = sequence.num_computed_tokens + len(shared) * sequence.hasher.block_size
        num_tokens = self._chunk(sequence, start)
        # A prefill takes all its blocks at once: it is never preempted, so it must never wait for blocks half way.
        num_covered = sequence.num_known_tokens if sequence.is_prefill else start + num_tokens
        num_new = max(0, sequence.num_blocks_for(num_covered) - sequence.num_leased_blocks - len(shared))
        if not self._claim(sequence, shared, num_new):
            return False
        self._add(PlannedSlice(sequence.sequence_id, start, num_tokens, shared, num_new))
        return True

    def _claim(self, sequence: Sequence, shared: tuple[BlockId, ...], num_new: int) -> bool:
        """Reserves blocks for an admission, or notes that they lack."""
        revived = [b for b in shared if self._pool.state(b) is BlockState.CACHED and b not in self._claimed]
        num_needed = num_new + len(revived)
        if num_needed > self._num_blocks_left:
            self._blocked = _Blocked(sequence, num_needed)
            return False
        self._claimed.update(revived)
        self._num_blocks_left -= len(revived)
        if sequence.state is SequenceState.AWAITING_KV:
            self._num_blocks_left -= num_new
        return True

    def _chunk(self, sequence: Sequence, start: int) -> int:
        """How many tokens from `start` on fit the budget; a prefill's chunk ends with a block where it can."""
        num_pending = sequence.num_known_tokens - start
        end = start + min(num_pending, self._num_tokens_left)
        if sequence.is_prefill and end < sequence.num_known_tokens:
            last_boundary = end // sequence.hasher.block_size * sequence.hasher.block_size
            end = last_boundary if last_boundary > start else end
        return end - start

    def _add(self, planned: PlannedSlice) -> None:
        self._slices[planned.sequence_id] = planned
        self._num_tokens_left -= planned.num_tokens
        self._num_blocks_left -= planned.num_new_blocks

    def _has_room_for_slice(self) -> bool:
        return self._num_tokens_left > 0 and len(self._slices) < self._limits.max_sequences

    def _preempt(self, victim: Sequence) -> None:
        """Takes a victim's blocks, and what this plan gave it."""
        planned = self._slices.pop(victim.sequence_id, None)
        if planned is not None:
            self._num_tokens_left += planned.num_tokens
            self._num_blocks_left += planned.num_new_blocks
        self._num_blocks_left += self._shared.give_back(victim)
        self._preempted[victim.sequence_id] = victim

    def _holders(self) -> list[Sequence]:
        """Sequences whose blocks may be taken, in order: no prefill's, because a peer may be reading them.

        Nor those of a sequence whose first tokens are being drawn: its forks will hold them when the plan is applied.
        """
        snapshot = self._snapshot
        holders = [
            sequence
            for sequence in (*snapshot.running, *snapshot.waiting)
            if sequence.lease
            and not sequence.is_prefill
            and not (sequence.is_unforked and sequence.num_placeholders)
            and sequence.sequence_id not in self._preempted
        ]
        return sorted(holders, key=lambda sequence: sequence.order)

    def _last_holder_after(self, sequence: Sequence) -> Sequence | None:
        holders = self._holders()
        return holders[-1] if holders and holders[-1].order > sequence.order else None

    def _take_from_idle(self, blocked: _Blocked) -> None:
        """Ends a standstill: nothing runs, somebody lacks blocks, and sequences that cannot go on now sit on some.

        Such a sequence waits for its client or for its turn. Whoever has no grant must not stop the others, even when
        it came first; it is recomputed later. Nothing is taken while all of it would not be enough.
        """
        idle = [each for each in self._holders() if each is not blocked.sequence and not _is_running(each)]
        while blocked.num_blocks + self._shared.cost_of_write(blocked.written) > self._num_blocks_left:
            if not idle:
                self._preempted.clear()
                return
            self._preempt(idle.pop())
