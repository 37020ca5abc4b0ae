"""Steps that are computed beside whoever begins them: the seam between an engine and a backend that can do so.

A step that only generates can be begun before the one before it has drawn its tokens: it takes them from there.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kernels.backend import Batch
from kernels.sampling import TokenDraw


class CannotBeginError(RuntimeError):
    """There is no thread to compute beside the caller's, and none can be started; nothing has begun."""


class StepInFlight(Protocol):
    """A step that was begun. Belongs to the thread that began it, which must finish or discard it."""

    @property
    def is_refused(self) -> bool:
        """Whether it is not computed when its turn comes, or was not: it is held, or what it follows brought no tokens.

        Of one whose turn has not come, only a hold is known.
        """

    def finish(self) -> list[int] | None:
        """Helps computing it to the end, and returns the drawn tokens; None when it was not computed to its end.

        A token is less than 0 where none can be drawn.
        """

    def discard(self) -> None:
        """Returns when nothing computes it any more."""


class Following(NamedTuple):
    """The batch's token ids are those that `step` draws: of row t, its draw `draws[t]`. Its own are not read.

    `step` was begun last before this one.
    """

    step: StepInFlight
    draws: tuple[int, ...]


class BackgroundStep(Protocol):
    """A model's definition and the drawing from its first result, computed in the order in which steps are begun.

    Tokens and bytes written are those of `Backend.compile_step` and `Backend.sample`. At most two steps are in flight.
    """

    def begin(
        self, batch: Batch, pages: Tensor, draws: Sequence[TokenDraw], *, follows: Following | None = None
    ) -> StepInFlight:
        """Begins a step and returns at once. The batch asks for no scores. Raises CannotBeginError."""

    def hold(self) -> None:
        """No step that follows another and is begun before `go_on` is computed, unless it is under way. Any thread."""

    def go_on(self) -> None:
        """Ends `hold`, for steps that are begun from now on."""
