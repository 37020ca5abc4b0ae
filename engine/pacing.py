"""Decides how many prompt tokens a step may compute while streams are waiting for their next token.

A step that generates and computes prompt tokens as well lasts longer than one that only generates; how much longer, the
steps themselves tell. Everything here follows from measured durations: there is no clock, and nothing that depends on
what the tokens are. It never stops a prompt: eight tokens of it are always allowed.
"""

import math
from typing import Final, NamedTuple

from engine.step import SequenceSlice

LEAST_PROMPT_TOKENS: Final = 8
"""Budgets begin with so many tokens, and are as far apart at first. Where reading weights is what bounds a step, eight
rows more cost next to nothing, and sixteen double it."""
_WEIGHT: Final = 0.25
"""Of the newest step in a running estimate: one step that something else on the machine made slow must not decide."""
_RETRY_STEPS: Final = 128
"""A budget that took too long is not tried again for so many steps: its cost stays below one gap in a hundred."""


class MeasuredStep(NamedTuple):
    """A step that was run: tokens of streams that go on, tokens of prompts (or of what is recomputed), seconds."""

    num_generating: int
    num_prompt_tokens: int
    seconds: float

    @classmethod
    def of(cls, slices: tuple[SequenceSlice, ...], seconds: float) -> "MeasuredStep":
        """A slice of one token is taken for a stream's."""
        num_tokens = [len(part.token_ids) for part in slices]
        num_generating = num_tokens.count(1)
        return cls(num_generating, sum(num_tokens) - num_generating, seconds)


class _Measured(NamedTuple):
    added_s: float
    """Seconds that a budget adds to a step."""
    step: int
    """The number of the step that told so last."""


class StepPacer:
    """Keeps steps that generate at or below `max_slowdown` times what they would take without prompt tokens.

    Budgets form a ladder whose rungs are eight tokens apart at first, then a quarter of their size. What a rung adds to
    a step is measured by using it. The next one is tried when it would fit with tokens as dear as those of the rung
    below; one that proves dearer is left, and then its own measure counts for a while. So the budget rests, but for one
    step in 128 at most.

    Every prompt that waits has a budget of its own, and the first in line may use them all: where many wait and few
    stream, many gain by what few lose. So a prompt waits longer than alone by a bound, however long the queue: a step
    computes eight tokens for it at least, and where more than 64 fit, for four fifths of the time by which
    `max_slowdown` lets the step grow. With 2 its tokens take 2.25 times as long as they cost. Engine thread only.
    """

    def __init__(self, *, max_slowdown: float, max_tokens: int) -> None:
        """`max_slowdown` is at least 1; infinity lets a prompt take whatever `max_tokens` of a step are left."""
        if not max_slowdown >= 1:  # NaN is not, either
            raise ValueError(f"max_slowdown is {max_slowdown}, needs at least 1")
        self._max_slowdown = max_slowdown
        self._budgets = _ladder(max_tokens)
        self._rung = len(self._budgets) - 1 if math.isinf(max_slowdown) else 0
        self._generating_s: dict[int, float] = {}
        """Seconds of a step that only generates, by the binary logarithm of the number of streams, rounded up."""
        self._measured: dict[int, _Measured] = {}
        """By rung."""
        self._num_steps = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens that the next step may compute if it generates, for every prompt that waits."""
        return self._budgets[self._rung]

    def observe(self, step: MeasuredStep) -> None:
        """Learns from a step. One that generates nothing keeps nobody waiting, and says nothing."""
        if math.isinf(self._max_slowdown) or not step.num_generating:
            return
        if not step.num_prompt_tokens:
            size = _size_class(step.num_generating)
            self._generating_s[size] = _blend(self._generating_s.get(size), step.seconds)
            return
        generating_s = self._estimate(step.num_generating)
        if generating_s is None or step.num_prompt_tokens < self.num_prompt_tokens:
            return  # nothing to compare with, or the short rest of a prompt, which says little of a whole budget
        self._num_steps += 1
        # Several prompts have several budgets; what one adds is its part.
        part = self.num_prompt_tokens / step.num_prompt_tokens
        added_s = _blend(self._added_s(self._rung), (step.seconds - generating_s) * part)
        self._measured[self._rung] = _Measured(added_s, self._num_steps)
        self._climb(added_s, allowed_s=(self._max_slowdown - 1) * generating_s)

    def _climb(self, added_s: float, *, allowed_s: float) -> None:
        """One rung down when this one adds too much, one up when that seems to fit."""
        if added_s > allowed_s:
            self._rung = max(0, self._rung - 1)
        elif self._rung + 1 < len(self._budgets):
            above_s = self._added_s(self._rung + 1)
            if above_s is None:
                above_s = added_s * self._budgets[self._rung + 1] / self._budgets[self._rung]
            self._rung += above_s <= allowed_s

    def _added_s(self, rung: int) -> float | None:
        """What was measured of a rung, unless that is too long ago."""
        known = self._measured.get(rung)
        return None if known is None or self._num_steps - known.step >= _RETRY_STEPS else known.added_s

    def _estimate(self, num_generating: int) -> float | None:
        """Seconds that a step takes which only generates for so many; of fewer streams rather than of more."""
        size = _size_class(num_generating)
        fewer = max((known for known in self._generating_s if known <= size), default=None)
        nearest = min(self._generating_s, default=None) if fewer is None else fewer
        return None if nearest is None else self._generating_s[nearest]


def _ladder(max_tokens: int) -> tuple[int, ...]:
    """Budgets in tokens, rising: 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 120… and at last `max_tokens`."""
    budget, rungs = LEAST_PROMPT_TOKENS, []
    while budget < max_tokens:
        rungs.append(budget)
        budget += max(1, budget // (4 * LEAST_PROMPT_TOKENS)) * LEAST_PROMPT_TOKENS
    return (*rungs, max_tokens)


def _size_class(count: int) -> int:
    return (count - 1).bit_length()


def _blend(estimate: float | None, value: float) -> float:
    return value if estimate is None else estimate + _WEIGHT * (value - estimate)
