"""The engine: takes requests, computes steps, tells what came of them. Engine thread only.

A request's way: `add` checks it → it waits for its turn, or for KV from elsewhere (`awaiting`) → `step` lets the
scheduler plan, runs the plan and commits it → with its first tokens it is forked, one sequence for each choice → every
piece of news is in the `StepOutput` → its blocks are given back. While streams only generate, a step is begun before
the one before it is over, and computed while that one is booked and told (`ahead`). Every choice of an accepted request
has exactly one ending. The engine must never let one request's failure reach another, and never hold a block that no
sequence owns.
"""

import logging
import math
import time
from collections.abc import Callable

from engine.admission import check_request
from engine.ahead import StepAhead
from engine.awaiting import AwaitingSequences, Ending
from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool
from engine.cache.prefix import CacheEvents, DisabledPrefixCache, PrefixCache
from engine.cache.source import KVSource
from engine.counts import EngineCounts, count
from engine.forking import fork
from engine.live import LiveSequences
from engine.pacing import MeasuredStep, StepPacer
from engine.planning import EngineLimits, StepPlan
from engine.reporting import choice_output, first_outputs, prefill_output
from engine.request import FinishReason, Request, RequestId, RequestKind, SequenceOutput, StepOutput
from engine.scheduler import Scheduler, SliceOutcome
from engine.sequence import Sequence, SequenceState
from engine.step import Runner, SequenceSlice
from staffetta import failpoint
from staffetta.errors import InvalidRequestError, QueueFullError, StepFailedError
from staffetta.hashing import BlockHasher

__all__ = ["Engine", "EngineCounts", "EngineLimits"]

log = logging.getLogger(__name__)


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
        self._pacer = StepPacer(max_slowdown=limits.max_slowdown, max_tokens=limits.max_batch_tokens)
        self._ahead = StepAhead(runner, self._scheduler, self._pool)
        self._awaiting: AwaitingSequences | None = None
        if source is not None:
            self._awaiting = AwaitingSequences(source, self._scheduler, self._pool, self._prefix)
        self._live = LiveSequences()
        self._new: list[Sequence] = []
        """Sequences about which the source has not been asked."""
        self._news: list[SequenceOutput] = []
        """Endings between steps."""
        self._num_steps = 0
        self._computed_at = -math.inf
        """When the last step was computed."""

    def add(self, request: Request) -> None:
        """Accepts a request. Raises a StaffettaError, leaving nothing behind, when it cannot be served ever, or now."""
        if request.request_id in self._live:
            raise InvalidRequestError("a request with this id is under way: ids are used once", param="request_id")
        check_request(request, self._limits, block_size=self._hasher.block_size, num_blocks=self._pool.num_blocks)
        if self._live.num_places + request.num_places > self._limits.max_requests:
            raise QueueFullError(
                f"this worker holds {self._live.num_places} requests, a choice counted as one, and may hold "
                f"{self._limits.max_requests}: retry later"
            )
        sequence = Sequence(request, self._hasher, BlockLease(self._pool), self._clock())
        self._live.add(sequence)
        if self._awaiting is not None and request.kind is RequestKind.GENERATE:
            self._new.append(sequence)
        else:
            self._scheduler.enqueue(sequence)

    def cancel(self, request_id: RequestId, choice_index: int | None = None) -> None:
        """Ends a request, or one choice of it; the last output of each choice that has none says CANCELLED. Idempotent.

        A prefill has one for all choices, and none when it was held: it has had its last output. It ends as a whole, or
        by the cancelling of a choice not at all.
        """
        for sequence in self._live.of(request_id):
            choices = sequence.open_choices
            if choice_index is not None:
                choices = (choice_index,) if choice_index in choices and not sequence.is_prefill else ()
            if not choices:
                continue
            is_held = sequence.state is SequenceState.HELD
            outputs = self._end(Ending(sequence, choices, FinishReason.CANCELLED))
            if not is_held:
                self._news.extend(outputs)

    def release(self, request_id: RequestId) -> None:
        """Frees a prefill's blocks; one that still runs ends without an output. Idempotent."""
        for sequence in self._live.of(request_id):
            if sequence.is_prefill:
                self._retire(sequence)

    def grant(self, request_id: RequestId, choice_index: int, tokens: int) -> None:
        """Lets a choice produce `tokens` more, also one that has not been forked off yet.

        Nothing happens for one that is over, or whose credit is unbounded.
        """
        if tokens < 0:
            raise InvalidRequestError(f"a grant of {tokens} tokens: 0 is the least", param="tokens")
        for sequence in self._live.of(request_id):
            if choice_index in sequence.choices:
                sequence.grant(choice_index, tokens)

    def has_work(self) -> bool:
        """Whether a request has no ending yet, or an ending is still to be told. Held prefills have theirs."""
        return bool(self._news) or any(s.state is not SequenceState.HELD for s in self._live)

    def step(self) -> StepOutput | None:
        """Takes the source's news in, computes one step, and returns all that is new.

        None says that nothing happened and nothing will before a command or news of the source. When it raises, nothing
        is computed any more.
        """
        try:
            num_events = self._take_news_in()
            plan = self._ahead.plan() or self._schedule()
            outputs = self._compute(plan)
            self._ahead.discard_if_unwanted()
        except BaseException:
            self._ahead.discard()
            raise
        news, self._news = self._news, []
        if not (num_events or news or outputs or plan.leases or plan.preempted or plan.slices):
            return None
        self._num_steps += 1
        return StepOutput(self._num_steps, (*news, *outputs))

    def hold(self) -> None:
        """Has the step that is under way be followed by none before `go_on`: there is news to take in. Any thread."""
        self._runner.hold()

    def go_on(self) -> None:
        """Ends `hold`: the news is about to be taken in."""
        self._runner.go_on()

    def close(self) -> None:
        """Returns when nothing is computed any more. What was computed beside the last `step` is forgotten."""
        self._ahead.discard()

    def counts(self) -> EngineCounts:
        """How full the engine is."""
        return count(
            self._live,
            self._pool,
            engine_steps=self._num_steps,
            num_copied_blocks=self._scheduler.num_copied_blocks,
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
        self._live.check_integrity(self._pool)

    def _take_news_in(self) -> int:
        """Polls and asks the source; returns how many events there were."""
        if self._awaiting is None:
            return 0
        news = self._awaiting.poll(now=self._clock())
        endings = list(news.endings)
        for sequence in news.complete:
            self._fork(sequence)
        new, self._new = self._new, []
        endings.extend(ending for sequence in new if (ending := self._awaiting.consult(sequence)) is not None)
        endings.extend(self._awaiting.restart_shrunk())
        for ending in endings:
            self._news.extend(self._end(ending))
        return news.num_events

    def _schedule(self) -> StepPlan:
        """The next plan that computes or leases something, or an empty one.

        A plan that only takes blocks back is carried out at once and planned again: its beneficiary joins in the same
        step.
        """
        while True:
            num_granted = 0 if self._awaiting is None else self._awaiting.num_granted
            plan = self._scheduler.schedule(self._scheduler.snapshot(self._pacer, num_granted=num_granted))
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
            began = self._computed_at if self._ahead.is_under_way else self._clock()
            computed = self._ahead.run(slices)
            outcomes: list[SliceOutcome] = self._run(slices) if computed is None else [*computed]
            self._computed_at = self._clock()
            self._pacer.observe(MeasuredStep.of(slices, self._computed_at - began))
        except BaseException:
            self._scheduler.rollback()
            raise
        committed = self._scheduler.commit(outcomes)
        return [output for sequence, outcome in committed for output in self._report(sequence, outcome)]

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

    def _report(self, sequence: Sequence, outcome: SliceOutcome) -> list[SequenceOutput]:
        """Books what a step brought for one sequence, and makes its outputs; none when there is nothing to tell."""
        if isinstance(outcome, StepFailedError):
            return self._end(Ending(sequence, sequence.open_choices, FinishReason.ERROR, outcome))
        result, now = outcome, self._clock()
        prompt_tokens = sequence.take_scored(result.prompt_tokens)
        if sequence.is_prefill:
            output = prefill_output(sequence, result, prompt_tokens, pool=self._pool, now=now)
            if output.tokens:
                self._scheduler.remove(sequence)
                sequence.state = SequenceState.HELD
        elif sequence.is_unforked and result.tokens:
            outputs = first_outputs(sequence, result, prompt_tokens, now=now)
            self._fork(sequence)
            return outputs
        else:
            output = choice_output(sequence, result, prompt_tokens, now=now)
            if output.finish_reason is not None:
                self._retire(sequence)
        return [output] if output.tokens or output.prompt_tokens or output.final_blocks else []

    def _fork(self, parent: Sequence) -> None:
        """Lets every choice of `parent` that is still open run on its own."""
        self._scheduler.remove(parent)
        forks = fork(parent)
        self._live.replace(parent, forks)
        for each in forks:
            self._scheduler.start(each)

    def _end(self, ending: Ending) -> list[SequenceOutput]:
        """Ends choices; with the last of its choices a sequence ends, too. A prefill has one output for all."""
        sequence = ending.sequence
        sequence.close(ending.choices)
        if not sequence.open_choices:
            self._retire(sequence)
        stats = sequence.stats(now=self._clock())
        return [
            SequenceOutput(
                sequence.request_id, choice, finish_reason=ending.finish_reason, error=ending.error, stats=stats
            )
            for choice in (ending.choices[:1] if sequence.is_prefill else ending.choices)
        ]

    def _retire(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives back all it has. Idempotent."""
        if sequence.state is SequenceState.FINISHED:
            return
        self._live.remove(sequence)
        self._scheduler.remove(sequence)
        if self._awaiting is not None:
            self._awaiting.abandon(sequence)
        if sequence in self._new:
            self._new.remove(sequence)
        sequence.release_blocks()
        sequence.state = SequenceState.FINISHED
