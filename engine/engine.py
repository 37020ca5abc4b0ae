"""The engine: takes requests, computes steps, tells what came of them. Engine thread only.

A request's way: `add` checks it → it waits for its turn, or for KV from elsewhere (`awaiting`) → `step` lets the
scheduler plan, runs the plan and commits it → every piece of news is in the `StepOutput` → its blocks are given back.
Every accepted request has exactly one ending. The engine must never let one request's failure reach another, and never
hold a block that no sequence owns.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from engine.admission import check_request
from engine.awaiting import AwaitingSequences
from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import CacheEvents, DisabledPrefixCache, PrefixCache
from engine.cache.source import KVSource
from engine.planning import EngineLimits, StepPlan
from engine.request import FinishReason, Request, RequestId, RequestKind, SampledToken, SequenceOutput, StepOutput
from engine.scheduler import Scheduler, SliceOutcome
from engine.sequence import Sequence, SequenceState
from engine.step import Runner, SequenceSlice
from kvtransfer.layout import BlockId
from staffetta import failpoint
from staffetta.errors import InvalidRequestError, QueueFullError, StaffettaError, StepFailedError
from staffetta.hashing import BlockHasher

__all__ = ["Engine", "EngineCounts", "EngineLimits"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounts:
    """How full the engine is, read from the sets that the numbers describe.

    `num_running` sequences can be computed in the next step; `num_waiting` wait for their turn, for KV from elsewhere
    or for a grant; `num_held` are prefills that wait for their release. `num_pending_tokens` are known and not
    computed.
    """

    total_blocks: int
    free_blocks: int
    held_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    num_running: int
    num_waiting: int
    num_held: int
    num_pending_tokens: int
    engine_steps: int


class Engine:
    """One model's requests. All methods belong to the engine thread; see `engine.thread` for the way in."""

    def __init__(
        self,
        runner: Runner,
        *,
        num_blocks: int,
        hasher: BlockHasher,
        limits: EngineLimits,
        source: KVSource | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._hasher = hasher
        self._limits = limits
        self._clock = clock
        self._pool = BlockPool(num_blocks)
        self._prefix = PrefixCache(self._pool) if limits.prefix_caching else DisabledPrefixCache(self._pool)
        self._scheduler = Scheduler(self._pool, self._prefix, limits, clock=clock)
        self._awaiting: AwaitingSequences | None = None
        if source is not None:
            self._awaiting = AwaitingSequences(source, self._scheduler, self._pool, self._prefix)
        self._sequences: dict[RequestId, Sequence] = {}
        """Every accepted request without an ending, and prefills that are held."""
        self._new: list[Sequence] = []
        """Sequences about which the source has not been asked."""
        self._news: list[SequenceOutput] = []
        """Endings between steps."""
        self._num_steps = 0

    def add(self, request: Request) -> None:
        """Accepts a request. Raises a StaffettaError, leaving nothing behind, when it cannot be served ever, or now."""
        if request.request_id in self._sequences:
            raise InvalidRequestError("a request with this id is under way: ids are used once", param="request_id")
        if len(self._sequences) >= self._limits.max_requests:
            raise QueueFullError(
                f"this worker holds {self._limits.max_requests} requests, as many as it may: retry later"
            )
        check_request(request, self._limits, block_size=self._hasher.block_size, num_blocks=self._pool.num_blocks)
        sequence = Sequence(request, self._hasher, BlockLease(self._pool), self._clock())
        self._sequences[request.request_id] = sequence
        if self._awaiting is not None and request.kind is RequestKind.GENERATE:
            self._new.append(sequence)
        else:
            self._scheduler.enqueue(sequence)

    def cancel(self, request_id: RequestId) -> None:
        """Ends a request; its last output says CANCELLED, unless it was held and had its last output. Idempotent."""
        if (sequence := self._sequences.get(request_id)) is not None:
            is_held = sequence.state is SequenceState.HELD
            output = self._finish(sequence, FinishReason.CANCELLED)
            if not is_held:
                self._news.append(output)

    def release(self, request_id: RequestId) -> None:
        """Frees a prefill's blocks; one that still runs ends without an output. Idempotent."""
        if (sequence := self._sequences.get(request_id)) is not None and sequence.is_prefill:
            self._finish(sequence, FinishReason.CANCELLED)

    def grant(self, request_id: RequestId, tokens: int) -> None:
        """Lets a request produce `tokens` more. Nothing happens for one that is over, or whose credit is unbounded."""
        if tokens < 0:
            raise InvalidRequestError(f"a grant of {tokens} tokens: 0 is the least", param="tokens")
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.credit is not None:
            sequence.credit += tokens

    def has_work(self) -> bool:
        """Whether a request has no ending yet, or an ending is still to be told. Held prefills have theirs."""
        return bool(self._news) or any(s.state is not SequenceState.HELD for s in self._sequences.values())

    def step(self) -> StepOutput | None:
        """Takes the source's news in, computes one step, and returns all that is new.

        None says that nothing happened and nothing will before a command or news of the source.
        """
        num_events = self._take_news_in()
        plan = self._schedule()
        outputs = self._compute(plan)
        news, self._news = self._news, []
        if not (num_events or news or outputs or plan.leases or plan.preempted or plan.slices):
            return None
        self._num_steps += 1
        return StepOutput(self._num_steps, (*news, *outputs))

    def counts(self) -> EngineCounts:
        """How full the engine is."""
        blocks = self._pool.counts()
        sequences = self._sequences.values()
        num_held = sum(1 for s in sequences if s.state is SequenceState.HELD)
        num_running = sum(1 for s in sequences if s.state is SequenceState.RUNNING and not s.is_paused)
        return EngineCounts(
            total_blocks=blocks.total,
            free_blocks=blocks.free,
            held_blocks=blocks.held,
            cached_blocks=blocks.cached,
            quarantined_blocks=blocks.quarantined,
            num_running=num_running,
            num_waiting=len(sequences) - num_held - num_running,
            num_held=num_held,
            num_pending_tokens=sum(s.num_pending_tokens for s in sequences if s.state is not SequenceState.HELD),
            engine_steps=self._num_steps,
        )

    def drain_cache_events(self) -> CacheEvents:
        """What entered and left the prefix cache since the last call."""
        return self._prefix.drain_events()

    def cache_snapshot(self) -> CacheEvents:
        """The whole prefix cache."""
        return self._prefix.snapshot()

    def check_integrity(self) -> None:
        """Recomputes who owns what. Raises IntegrityError naming the first contradiction. Between steps only."""
        self._pool.check_integrity()
        self._prefix.check_integrity()
        self._scheduler.check_integrity()
        if self._awaiting is not None:
            self._awaiting.check_integrity()
        owned: Counter[BlockId] = Counter()
        for sequence in self._sequences.values():
            table = tuple(sequence.lease.table)
            owned.update(table)
            if sequence.num_computed_tokens > len(table) * self._hasher.block_size:
                raise IntegrityError(f"{sequence.request_id} computed more than its {len(table)} blocks hold")
            num_full = sequence.num_computed_tokens // self._hasher.block_size
            if any(self._pool.is_published(block_id) for block_id in table[num_full:]):
                raise IntegrityError(f"{sequence.request_id} would write into a published block of {table}")
            if sequence.state is SequenceState.FINISHED:
                raise IntegrityError(f"{sequence.request_id} is finished and still here")
        for number in range(self._pool.num_blocks):
            block_id = BlockId(number)
            if self._pool.num_references(block_id) != owned[block_id]:
                num_references = self._pool.num_references(block_id)
                raise IntegrityError(
                    f"block {block_id} has {num_references} references, sequences own {owned[block_id]}"
                )

    def _take_news_in(self) -> int:
        """Polls and asks the source; returns how many events there were."""
        if self._awaiting is None:
            return 0
        num_events, endings = self._awaiting.poll(now=self._clock())
        new, self._new = self._new, []
        endings.extend(ending for sequence in new if (ending := self._awaiting.consult(sequence)) is not None)
        endings.extend(self._awaiting.restart_shrunk())
        self._news.extend(self._finish(*ending) for ending in endings)
        return num_events

    def _schedule(self) -> StepPlan:
        """The next plan that computes or leases something, or an empty one.

        A plan that only takes blocks back is carried out at once and planned again: its beneficiary joins in the same
        step.
        """
        while True:
            num_granted = 0 if self._awaiting is None else self._awaiting.num_granted
            plan = self._scheduler.schedule(self._scheduler.snapshot(num_granted=num_granted))
            if plan.slices or plan.leases or not plan.preempted:
                return plan
            self._scheduler.apply(plan)

    def _compute(self, plan: StepPlan) -> list[SequenceOutput]:
        slices = self._scheduler.apply(plan)
        if self._awaiting is not None:
            for lease in plan.leases:
                self._awaiting.grant(lease, now=self._clock())
        if not slices:
            return []
        try:
            failpoint.hit("engine.step")
            outcomes = self._run(slices)
        except BaseException:
            self._scheduler.rollback()
            raise
        reports = [self._report(sequence, outcome) for sequence, outcome in self._scheduler.commit(outcomes)]
        return [output for output in reports if output is not None]

    def _run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceOutcome]:
        """Runs the slices; while that raises, in halves, so that nobody fails but whose slice raises alone."""
        try:
            return list(self._runner.run(slices))
        except Exception as error:
            if len(slices) == 1:
                log.exception("request %s: its step raised %s", slices[0].request_id, type(error).__name__)
                return [StepFailedError("computing this request failed; other requests are not affected")]
        middle = len(slices) // 2
        return self._run(slices[:middle]) + self._run(slices[middle:])

    def _report(self, sequence: Sequence, outcome: SliceOutcome) -> SequenceOutput | None:
        """Books what a step brought for one sequence, and makes its output; None when there is nothing to tell."""
        if isinstance(outcome, StepFailedError):
            return self._finish(sequence, FinishReason.ERROR, outcome)
        tokens = outcome.tokens
        reason = sequence.append(tokens[0], now=self._clock()) if tokens else None
        if sequence.is_prefill:
            return self._report_prefill(sequence, tokens)
        if reason is not None:
            return self._finish(sequence, reason, tokens=tokens)
        return SequenceOutput(sequence.request_id, tokens=tokens) if tokens else None

    def _report_prefill(self, sequence: Sequence, tokens: tuple[SampledToken, ...]) -> SequenceOutput | None:
        final_blocks = sequence.new_final_blocks(self._pool)
        if not tokens:
            return SequenceOutput(sequence.request_id, final_blocks=final_blocks) if final_blocks else None
        self._scheduler.remove(sequence)
        sequence.state = SequenceState.HELD
        stats = sequence.stats(now=self._clock())
        return SequenceOutput(sequence.request_id, tokens=tokens, final_blocks=final_blocks, stats=stats)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: StaffettaError | None = None,
        *,
        tokens: tuple[SampledToken, ...] = (),
    ) -> SequenceOutput:
        """Ends a sequence wherever it is, and gives back all it has."""
        del self._sequences[sequence.request_id]
        self._scheduler.remove(sequence)
        if self._awaiting is not None:
            self._awaiting.abandon(sequence)
        if sequence in self._new:
            self._new.remove(sequence)
        sequence.release_blocks()
        sequence.state = SequenceState.FINISHED
        stats = sequence.stats(now=self._clock())
        return SequenceOutput(sequence.request_id, tokens=tokens, finish_reason=reason, error=error, stats=stats)
