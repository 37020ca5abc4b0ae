"""A fake runner whose steps are computed beside the engine, as early or as late as a driver might."""

from collections.abc import Callable

from engine.fake import FakeRunner
from engine.request import RequestId
from engine.step import Following, SequenceSlice, SliceResult, StepInFlight


class ContractBrokenError(BaseException):
    """A step was begun that may not be. No exception that an engine takes for a failure of computing."""


class FakeStep:
    """A step in flight. What it follows is computed before it; it never is when that brought nothing, or at a hold."""

    def __init__(
        self, runner: "BackgroundFakeRunner", slices: tuple[SequenceSlice, ...], follows: Following | None
    ) -> None:
        self._runner = runner
        self._slices = slices
        self._follows = follows
        self._is_over = False
        self._num_holds_known = runner.num_holds_known
        self._was_refused = False
        self.next: FakeStep | None = None
        self.results: list[SliceResult | None] | None = None

    @property
    def is_refused(self) -> bool:
        return self._was_refused or (not self._is_over and self._is_held)

    @property
    def _is_held(self) -> bool:
        return self._follows is not None and self._num_holds_known != self._runner.num_holds

    def compute(self) -> None:
        """Its turn has come."""
        if self._is_over:
            return
        self._is_over = True
        if self._follows is not None:
            before = self._follows.step
            assert isinstance(before, FakeStep) and before._is_over, "a step is computed before the one that it follows"
            brought = before.results or [None] * len(before._slices)
            drawn = [result.tokens for number in self._follows.slices if (result := brought[number]) is not None]
            if len(drawn) < len(self._slices) or self._is_held:
                self._was_refused = True
                return
            self._slices = tuple(
                part._replace(token_ids=(tokens[0].token_id,)) for part, tokens in zip(self._slices, drawn, strict=True)
            )
        try:
            results = FakeRunner.run(self._runner, self._slices)
        except RuntimeError:
            return
        self.results = [
            None if part.request_id in self._runner.undrawable else result
            for part, result in zip(self._slices, results, strict=True)
        ]

    def finish(self) -> list[SliceResult | None] | None:
        self.compute()
        self._runner.end(self)
        if self.next is not None and self._runner.is_prompt():
            self.next.compute()
        self._runner.about_to_return()
        return self.results

    def discard(self) -> None:
        """Whatever was not computed by then never is, or at the last moment."""
        if self._runner.is_prompt():
            self.compute()
        self._is_over = True
        self._runner.end(self)


class BackgroundFakeRunner(FakeRunner):
    """Begins steps. `is_prompt` says, time and again, whether a step that may be computed is, without being asked."""

    def __init__(self, *, block_size: int, is_prompt: Callable[[], bool] = lambda: True) -> None:
        super().__init__(block_size=block_size)
        self.is_prompt = is_prompt
        self.num_holds = self.num_holds_known = 0
        self.in_flight: list[FakeStep] = []
        self.undrawable: set[RequestId] = set()
        """Requests of which steps that are begun draw no token."""
        self.num_ahead = 0
        """Steps that were begun after another one."""

    @property
    def can_begin(self) -> bool:
        return True

    def begin(self, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        for part in slices:
            draw = part.draw
            if draw is None or (len(part.token_ids), len(draw.choices)) != (1, 1) or part.score or part.copy:
                raise ContractBrokenError(part)
        step = FakeStep(self, slices, follows)
        if follows is None:
            assert not self.in_flight, "a step that follows none is begun when none is in flight"
        else:
            assert self.in_flight == [follows.step], "a step follows the only one in flight"
            self.in_flight[0].next = step
            self.num_ahead += 1
        self.in_flight.append(step)
        return step

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        assert not self.in_flight, "a step is run while another one is in flight"
        results = super().run(slices)
        self.about_to_return()
        return results

    def about_to_return(self) -> None:
        """A step is computed, and its results are about to be told."""

    def end(self, step: FakeStep) -> None:
        if step in self.in_flight:
            assert self.in_flight.pop(0) is step, "steps end in order"

    def hold(self) -> None:
        self.num_holds += 1

    def go_on(self) -> None:
        self.num_holds_known = self.num_holds
