"""Decides how many prompt tokens a step may compute, for the sake of streams and of prompts that wait for its end.

While one prompt waits, a step beside streams takes at most `max_slowdown` times as long as one that only generates;
every further prompt, up to the eighth, lets it take as much longer again, because many then gain by what few lose. A
short prompt, of at most 512 tokens that one step could compute whole, counts as four: it is over after a few long gaps,
where a long one would make hundreds. Its length when it began counts, so the end of a long prompt is not short. A
stream's gap is at most 1 + 8 x (max_slowdown - 1) times its usual one, 5.8 times where that is 1.6, but where even the
four tokens of each prompt that are always allowed take longer. What is usual changes with the streams' contexts and
with the machine, so after every 32 steps with prompt tokens one goes without.

Without streams, a step takes prompts until it is so long that what every step costs hardly matters: the first of a
burst then have their tokens while the others are computed. It is never kept shorter than the longest of the prompts
that count would have it, which would be slow beside the streams of those before it.

Everything here follows from measured durations: there is no clock, and nothing that depends on what the tokens are.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from engine.step import SequenceSlice

LEAST_PROMPT_TOKENS: Final = 4
"""Of each prompt that counts: far into a long prompt attention alone makes eight cost as much as a step of streams."""
_RUNG_TOKENS: Final = 8
"""How far apart budgets are at first: where reading weights is what bounds a step, so many cost next to nothing."""
MOST_PROMPTS: Final = 8
"""Prompts that count. With so many, waiting costs them a fifth more than computing them alone."""
_SHORT_COUNTS: Final = 4
"""Prompts that a short one counts as: with half as many it waits noticeably longer, with twice as many hardly less."""
_SHORT_TOKENS: Final = 512
"""Of a short prompt at most, however many a step may compute: few enough for a few long gaps."""
_RELEARN_STEPS: Final = 32
"""Steps with prompt tokens until one goes without, to learn anew how long that takes: prompts wait 3 % longer."""
_LONG_ENOUGH: Final = 8
"""Steps that generate for one stream: if one step is as long, at most an eighth of it is what every step costs."""
_RETRY_STEPS: Final = 128
"""A budget that took too long is not tried again for so many steps: its cost stays below one gap in a hundred."""
_NUM_SAMPLES: Final = 5
"""Of what is measured; their middle counts: a step that something else on the machine made slow must not decide."""
_KEPT: Final = 0.75
"""Of the sums that tell what a prompt token costs, from one step without streams to the next."""


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


class WaitingPrompt(NamedTuple):
    """A prompt to compute: its tokens when it began, and those left. Tokens from the prefix cache are in neither."""

    num_tokens: int
    num_left: int


class _Samples:
    """The newest few measures of one thing, in seconds."""

    __slots__ = ("_newest",)

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=_NUM_SAMPLES)

    def add(self, seconds: float) -> None:
        self._newest.append(seconds)

    def middle(self) -> float:
        """The lower middle one. There is one at least."""
        return statistics.median_low(self._newest)


class StepPacer:
    """Says what a step may compute of prompts, and learns from every step.

    What a budget adds to a step is known in two ways. Steps without streams tell what a prompt token costs: as much as
    beside streams where computing bounds a step, more where reading weights does, because the streams' rows need them
    anyway. So that is a safe guess for a budget of any size, and no stream pays for learning it. Steps with streams
    tell the truth about the budgets that they used; one rung above such a budget is tried when tokens as dear as its
    own would fit, and a rung that proves dearer is left for a while. The largest budget that fits is taken, whatever
    was measured of smaller ones: what a budget adds depends on who streams. Engine thread only.
    """

    def __init__(self, *, max_slowdown: float, max_tokens: int) -> None:
        """`max_slowdown` is at least 1; infinity lets prompts take whatever `max_tokens` of a step are left."""
        if not max_slowdown >= 1:  # NaN is not, either
            raise ValueError(f"max_slowdown is {max_slowdown}, needs at least 1")
        self._max_slowdown = max_slowdown
        self._budgets = _ladder(max_tokens)
        self._generating: dict[int, _Samples] = {}
        """Steps that only generate, by the binary logarithm of the number of streams, rounded up."""
        self._added: dict[int, _Samples] = {}
        """What a budget adds to a step, by rung."""
        self._measured_at: dict[int, int] = {}
        """By rung, the number of the step that told the newest of that."""
        self._alone_s = self._alone_tokens = 0.0
        """Seconds and tokens of steps without streams; the newest count most, and long ones more than short ones."""
        self._num_steps = 0
        """Steps with both that told something about a budget."""
        self._num_mixed = 0
        """Steps with both since the last one that only generated."""

    def num_prompt_tokens(self, *, num_streams: int, prompts: Sequence[WaitingPrompt]) -> int:
        """Prompt tokens that a step may compute beside `num_streams` tokens of streams while `prompts` wait.

        They are one at least. 0 beside streams where the length of a step that only generates has to be learned, for
        the first time or anew: the next step is to be one.
        """
        if math.isinf(self._max_slowdown):
            return self._budgets[-1]
        if not num_streams:
            return self._num_alone(prompts)
        generating_s = self._estimate(num_streams)
        if generating_s is None or self._num_mixed >= _RELEARN_STEPS:
            return 0
        most_short = min(_SHORT_TOKENS, self._budgets[-1])
        counts = [_SHORT_COUNTS if prompt.num_tokens <= most_short else 1 for prompt in prompts]
        allowed_s = min(sum(counts), MOST_PROMPTS) * (self._max_slowdown - 1) * generating_s
        fitting = [budget for rung, budget in enumerate(self._budgets) if self._expected_s(rung) <= allowed_s]
        least = min(LEAST_PROMPT_TOKENS * min(len(prompts), MOST_PROMPTS), self._budgets[-1])
        return max([least, *fitting])

    def _num_alone(self, prompts: Sequence[WaitingPrompt]) -> int:
        """Prompt tokens of a step without streams; as many as it has room for until it is known what they cost."""
        most = self._budgets[-1]
        shortest_s = self._estimate(1)
        if shortest_s is None or not self._alone_s:
            return most
        long_enough = min(_LONG_ENOUGH * shortest_s / self._alone_s * self._alone_tokens, most)
        return min(max(math.ceil(long_enough), *(prompt.num_left for prompt in prompts)), most)

    def observe(self, step: MeasuredStep) -> None:
        """Learns from a step."""
        if not step.num_generating:
            self._alone_s = _KEPT * self._alone_s + step.seconds
            self._alone_tokens = _KEPT * self._alone_tokens + step.num_prompt_tokens
        elif not step.num_prompt_tokens:
            self._generating.setdefault(_size_class(step.num_generating), _Samples()).add(step.seconds)
            self._num_mixed = 0
        else:
            self._num_mixed += 1
            self._observe_both(step)

    def _observe_both(self, step: MeasuredStep) -> None:
        generating = self._generating.get(_size_class(step.num_generating))
        fully_used = [rung for rung, budget in enumerate(self._budgets) if budget <= step.num_prompt_tokens]
        if generating is None or not fully_used:
            return  # nothing to compare with but a guess, or the short rest of a prompt
        self._num_steps += 1
        rung = fully_used[-1]
        if not self._is_known(rung):
            self._added[rung] = _Samples()
        part = self._budgets[rung] / step.num_prompt_tokens
        self._added[rung].add((step.seconds - generating.middle()) * part)
        self._measured_at[rung] = self._num_steps

    def _expected_s(self, rung: int) -> float:
        """Seconds that a budget adds to a step, as far as can be told; infinite for one that is not to be tried."""
        if self._is_known(rung):
            return self._added[rung].middle()
        # Weights are read once, so a token's price rises with the budget: from nothing to what it is alone.
        below, above = self._nearest(range(rung - 1, -1, -1)), self._nearest(range(rung + 1, len(self._budgets)))
        least_s = 0.0 if below is None else self._price(below)
        if above is not None:
            most_s = self._price(above)
        else:
            most_s = self._alone_s / self._alone_tokens if self._alone_tokens else math.inf
        is_next = below == rung - 1
        return self._budgets[rung] * (least_s if is_next else max(least_s, most_s))

    def _price(self, rung: int) -> float:
        """Seconds that each token of a known budget adds."""
        return self._added[rung].middle() / self._budgets[rung]

    def _nearest(self, rungs: range) -> int | None:
        """The first of `rungs` that is known."""
        return next((rung for rung in rungs if self._is_known(rung)), None)

    def _is_known(self, rung: int) -> bool:
        """Whether a budget was measured, and not too long ago."""
        return rung in self._added and self._num_steps - self._measured_at[rung] < _RETRY_STEPS

    def _estimate(self, num_generating: int) -> float | None:
        """Seconds that a step takes which only generates for so many; of fewer streams rather than of more."""
        size = _size_class(num_generating)
        fewer = max((known for known in self._generating if known <= size), default=None)
        nearest = min(self._generating, default=None) if fewer is None else fewer
        return None if nearest is None else self._generating[nearest].middle()


def _ladder(max_tokens: int) -> tuple[int, ...]:
    """Budgets in tokens, rising: 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 120… and at last `max_tokens`."""
    budget, rungs = _RUNG_TOKENS, [LEAST_PROMPT_TOKENS]
    while budget < max_tokens:
        rungs.append(budget)
        budget += max(1, budget // (4 * _RUNG_TOKENS)) * _RUNG_TOKENS
    return (*[rung for rung in rungs if rung < max_tokens], max_tokens)


def _size_class(count: int) -> int:
    return (count - 1).bit_length()
