"""The step after the one under way, begun before that has drawn its tokens: no step waits for the engine thread.

While streams only generate, what the next step computes is known but for the tokens: each goes on by the one that it is
drawing. Such a step is begun here, follows in the kernels at once, and becomes the plan of the engine's next turn. All
books are kept then: here nothing is counted as computed, and nothing has to be undone when it comes to nothing.

A sequence may have ended by then (a stop token, a cancel). Its slice is computed for nothing, into blocks that are free
already. That is safe because nothing else can write there before: blocks are leased to a peer, copied, or written by a
step only in turns of the engine that come after this step's end.
"""

import logging
from typing import NamedTuple

from engine.cache.pool import BlockPool, IntegrityError
from engine.planning import PlannedSlice, StepPlan
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState
from engine.step import Draw, Following, Runner, SequenceSlice, SliceResult, StepInFlight

log = logging.getLogger(__name__)


class _Begun(NamedTuple):
    """A step that was begun ahead: each slice is one token of a sequence, at a position."""

    step: StepInFlight
    sequences: tuple[Sequence, ...]
    starts: tuple[int, ...]

    def survivors(self) -> list[int]:
        """The numbers of slices whose sequence goes on."""
        return [i for i, sequence in enumerate(self.sequences) if sequence.state is SequenceState.RUNNING]


class StepAhead:
    """At most one step that was begun ahead. Engine thread only; see `Runner.hold` for the exception."""

    def __init__(self, runner: Runner, scheduler: Scheduler, pool: BlockPool) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self._begun: _Begun | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether there is one."""
        return self._begun is not None

    def plan(self) -> StepPlan | None:
        """The plan of the step that is under way, which is to be applied and run; None when there is none.

        One that does not go on, or for nobody, is discarded.
        """
        if self._begun is None:
            return None
        survivors = self._begun.survivors()
        if not survivors or self._begun.step.is_refused:
            self.discard()
            return None
        sequences, starts = self._begun.sequences, self._begun.starts
        return StepPlan(slices=tuple([PlannedSlice(sequences[i].sequence_id, starts[i], 1, (), 0) for i in survivors]))

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult] | None:
        """Computes the applied step: the one under way, or one that only generates. Begins the next before it waits.

        None for any other step, and where computing failed: it is to be run in the ordinary way, which says whose
        failure it is. Raises IntegrityError for a contradiction in the books, with nothing in flight.
        """
        if not self._runner.can_begin:
            return None
        begun, self._begun = self._begun, None
        step = None if begun is None else begun.step
        numbers = range(len(slices)) if begun is None else begun.survivors()
        try:
            going_on = self._going_on(slices)
            if going_on and step is None:
                step = self._runner.begin(slices)
            if going_on and step is not None:
                self._begin_after(step, going_on, tuple([numbers[i] for i in going_on]))
            finished = None if step is None else step.finish()
        except BaseException as error:
            if step is not None:
                step.discard()
            self.discard()
            if isinstance(error, IntegrityError) or not isinstance(error, Exception):
                raise
            log.exception("a step that was begun raised")
            return None
        wanted = [] if finished is None else [finished[number] for number in numbers]
        results = [result for result in wanted if result is not None]
        if len(results) == len(slices):
            return results
        self.discard()
        return None

    def discard_if_unwanted(self) -> None:
        """Ends the step that is under way when all that it computes has ended."""
        if self._begun is not None and not self._begun.survivors():
            self.discard()

    def discard(self) -> None:
        """Ends the step that is under way, if there is one; nobody needs it any more."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.step.discard()

    def _going_on(self, slices: tuple[SequenceSlice, ...]) -> dict[int, Sequence]:
        """The sequences that the next step will compute a token of, by the number of their slice in the applied one.

        There are none when that depends on more than the tokens that are being drawn. They have the blocks that they
        need for it then.
        """
        scheduler = self._scheduler
        if not all(map(_only_generates, slices)):
            return {}
        sequences = scheduler.in_flight
        computed = {sequence.sequence_id for sequence in sequences}
        if any(each.is_computable and each.sequence_id not in computed for each in scheduler.running):
            return {}
        going_on = {i: sequence for i, sequence in enumerate(sequences) if sequence.is_computable}
        if scheduler.has_joining(num_going_on=len(going_on)):
            return {}
        lacking = [each for each in going_on.values() if each.num_leased_blocks < each.num_blocks_for(_end(each))]
        if len(lacking) > self._pool.num_available:
            return {}
        for sequence in lacking:
            sequence.lease.extend(1)
        return going_on

    def _begin_after(self, step: StepInFlight, going_on: dict[int, Sequence], numbers: tuple[int, ...]) -> None:
        """Begins the step of one token of each sequence, which slice `numbers[i]` of `step` draws."""
        sequences = tuple(going_on.values())
        starts = tuple([sequence.num_computed_tokens for sequence in sequences])
        begun = self._runner.begin(tuple(map(_next_slice, sequences)), follows=Following(step, numbers))
        self._begun = None if begun is None else _Begun(begun, sequences, starts)


def _end(sequence: Sequence) -> int:
    """Where the slice of the token that is being drawn ends."""
    return sequence.num_computed_tokens + 1


def _only_generates(part: SequenceSlice) -> bool:
    """Whether a slice is one token of a stream, and all that matters of it is which token comes next."""
    draw = part.draw
    if draw is None or len(part.token_ids) != 1 or len(draw.choices) != 1 or part.score or part.copy:
        return False
    return not draw.sampling.is_penalised and draw.sampling.num_logprobs is None


def _next_slice(sequence: Sequence) -> SequenceSlice:
    """The token that is being drawn; 0 stands for its id."""
    return SequenceSlice(
        request_id=sequence.request_id,
        token_ids=(0,),
        start=sequence.num_computed_tokens,
        block_ids=sequence.block_ids(_end(sequence)),
        draw=Draw(sequence.request.sampling, sequence.next_output_index, sequence.choices),
    )
