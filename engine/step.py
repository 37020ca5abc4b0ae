"""The values between scheduler and runner: what one step computes. No torch.

What every stream has one of in every step is a named tuple, here and in `request`: it is made in a third of the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.request import PromptToken, RequestId, SampledToken, SamplingParams
from kvtransfer.layout import BlockId


class Draw(NamedTuple):
    """What the logits after a slice are for: one token for each of `choices`, at output position `output_index`.

    All choices share the logits; each has random numbers of its own. `prompt_token_ids` and `output_token_ids` are what
    penalties count: of the prompt each id once, and only for a repetition penalty; of the output every token.
    """

    sampling: SamplingParams
    output_index: int
    choices: tuple[int, ...] = (0,)
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """Asks how likely the prompt's next tokens are: row i of the slice scores `targets[i]`, at position start + i + 1.

    There may be fewer targets than rows: the last row of a prompt has none. `num_alternatives` of the likeliest tokens
    are wanted as well.
    """

    targets: tuple[int, ...]
    num_alternatives: int


class BlockCopy(NamedTuple):
    """A block whose content is wanted in another one, because the slice writes where others still read."""

    source: BlockId
    destination: BlockId


class SequenceSlice(NamedTuple):
    """One sequence's part of a step: compute `token_ids`, the tokens at positions [start, start + len(token_ids)).

    `block_ids` covers every position up to the end of the slice. `draw` is set when the slice ends at the last known
    token, so that the next one is drawn. `copy` is carried out before anything of the step is computed; the source's
    positions before `start` stay as they are until the step is over.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[BlockId, ...]
    draw: Draw | None = None
    score: Score | None = None
    copy: BlockCopy | None = None


class SliceResult(NamedTuple):
    """What a slice brought: a token for each choice of its `draw`, a scored one for each target of its `score`."""

    tokens: tuple[SampledToken, ...] = ()
    prompt_tokens: tuple[PromptToken, ...] = ()


class StepInFlight(Protocol):
    """A step that was begun and is computed beside the engine thread, which must finish or discard it."""

    @property
    def is_refused(self) -> bool:
        """Whether it is not computed when its turn comes, or was not: it is held, or what it follows brought no tokens.

        Of one whose turn has not come, only a hold is known.
        """

    def finish(self) -> Sequence[SliceResult | None] | None:
        """Returns the results, in order, None for a slice whose token cannot be drawn.

        None when it was not computed to its end. Slices without a result are to be run instead.
        """

    def discard(self) -> None:
        """Returns when nothing of it is computed any more; its results are not wanted."""


class Following(NamedTuple):
    """A step's slices begin where `step` ends: slice i computes the token that slice `slices[i]` of `step` draws.

    `step` was begun last before. What the slices have as their token ids is not read.
    """

    step: StepInFlight
    slices: tuple[int, ...]


class Runner(Protocol):
    """Computes steps. The real one is `engine.runner.ModelRunner`; `engine.fake.FakeRunner` ships for tests."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        """Writes the slices' KV and returns their results, in order. No other step is in flight.

        Running the same slices again writes the same bytes, so a step that raised may be repeated in parts. Engine
        thread.
        """

    @property
    def can_begin(self) -> bool:
        """Whether steps can be begun. Once they cannot, they never can again."""

    def begin(self, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        """Begins what `run` does and returns at once; None, and nothing has begun, where that cannot be.

        For slices of one token that draw one, without penalties, log-probabilities or copies. Steps are computed one
        after another, in the order in which they are begun; at most two are in flight. Engine thread.
        """

    def hold(self) -> None:
        """No step that follows another and is begun before `go_on` is computed, unless it is under way. Any thread."""

    def go_on(self) -> None:
        """Ends `hold`, for steps that are begun from now on."""


class NothingBegun:
    """The part of a `Runner` that computes in `run` alone."""

    @property
    def can_begin(self) -> bool:
        """No."""
        return False

    def begin(self, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        """None: everything is computed in `run`."""
        del slices, follows
        return None

    def hold(self) -> None:
        """Nothing is ever begun."""

    def go_on(self) -> None:
        """Nothing is ever begun."""
