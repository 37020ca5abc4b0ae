"""Steps beside the thread that begins them: a driver of compiled code computes, and the thread helps once it is idle.

While that thread does something else the kernels have one thread less, which is why this is for two threads and more.
What a step reads and writes must stay where it is until the step is done, so a few places for that take turns.
"""

from array import array
from collections.abc import Sequence
from ctypes import addressof, byref, c_int32, pointer
from itertools import count, cycle
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kernels.backend import Batch, Definition
from kernels.background import CannotBeginError, Following
from kernels.cpu import library as abi
from kernels.cpu.library import RowsOf, Status, matrix
from kernels.cpu.sampling import pack_draws
from kernels.cpu.step import PreparedCall, Program
from kernels.sampling import TokenDraw

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

_NUM_JOBS: Final = 3
"""Two in flight, and the one before them, whose tokens the first of them may not have read yet."""


class _Holds:
    """Every hold has a number of its own; a step that follows is held when there is one that its begin did not know.

    It is so also when the driver looks only after `go_on`.
    """

    def __init__(self) -> None:
        self.last = c_int32(0)
        """The driver reads it, too."""
        self.known = 0
        self._numbers = count(1)

    def hold(self) -> None:
        """Any thread: a number that is written late is still another one."""
        self.last.value = next(self._numbers)

    def go_on(self) -> None:
        """What was held for is about to be looked at."""
        self.known = self.last.value


class CpuStepInFlight:
    """A place for a step, and the step that has it. See `kernels.background.StepInFlight`."""

    def __init__(self, backend: "CpuBackend", program: Program, holds: _Holds) -> None:
        self._library = backend.library
        self._call = PreparedCall(program)
        self._logits: Tensor | None = None  # those that the job describes
        self._keep: tuple[object, ...] = ()
        self._tokens = self._sources = array("q")
        self._holds = holds
        self._job = abi.StepJob(
            set=backend.isa,
            threads=backend.threads,
            program=pointer(program.description),
            call=pointer(self._call.description),
            num_holds=addressof(holds.last),
        )

    @property
    def is_refused(self) -> bool:
        """Whether it is not computed when its turn comes, or was not."""
        job, status = self._job, self._job.status
        is_held = bool(job.before) and job.num_holds_known != self._holds.last.value
        return bool(status == Status.NOT_RUN or (status == abi.NOT_BEGUN and is_held))

    def begin(self, batch: Batch, pages: Tensor, draws: Sequence[TokenDraw], *, follows: Following | None) -> None:
        """Has the step computed. Raises CannotBeginError."""
        job, call = self._job, self._call
        call.prepare(batch, pages)
        if call.results[0] is not self._logits:
            self._logits = call.results[0]
            job.logits = matrix(self._logits)
        packed, token_ids = pack_draws(draws)
        self._tokens = array("q", bytes(8 * len(draws)))
        job.draws, job.drawn_ids, job.num_draws = packed, token_ids, len(draws)
        job.tokens, _ = self._tokens.buffer_info()
        job.token_ids, job.before = call.description.numbers, None
        if follows is not None:
            self._sources = array("q", follows.draws)
            job.sources, _ = self._sources.buffer_info()
            if not isinstance(follows.step, CpuStepInFlight):
                raise TypeError(f"{follows.step!r} is no step of the compiled kernels")
            job.before = addressof(follows.step._job)
        self._keep = batch, pages, packed, token_ids
        job.is_unwanted, job.num_holds_known = 0, self._holds.known
        if self._library.staffetta_step_begin(byref(job)):
            raise CannotBeginError("the system starts no more threads: raise its limit (ulimit -u)")

    def finish(self) -> list[int] | None:
        """Helps computing it to the end, and returns the drawn tokens; None when it was not."""
        if self._library.staffetta_step_finish(byref(self._job)):
            return None
        return self._tokens.tolist()

    def discard(self) -> None:
        """Returns when nothing computes it any more: after the operation that it is at."""
        self._job.is_unwanted = 1
        self._library.staffetta_step_finish(byref(self._job))


class CpuBackgroundStep:
    """A definition whose steps a driver computes. See `kernels.background.BackgroundStep`."""

    def __init__(self, backend: "CpuBackend", definition: Definition) -> None:
        """Records `definition`. Raises ValueError or TypeError for one that cannot be recorded, or has no logits."""
        program = Program(definition)
        logits = program.recording.results[0]
        if (logits.rows_of, logits.dtype) != (RowsOf.DRAWN, torch.float32):
            raise ValueError(f"tokens are drawn from the definition's first result, which has {logits}")
        self._holds = _Holds()
        self._steps = cycle([CpuStepInFlight(backend, program, self._holds) for _ in range(_NUM_JOBS)])

    def begin(
        self, batch: Batch, pages: Tensor, draws: Sequence[TokenDraw], *, follows: Following | None = None
    ) -> CpuStepInFlight:
        """Begins a step and returns at once. Raises CannotBeginError."""
        step = next(self._steps)
        step.begin(batch, pages, draws, follows=follows)
        return step

    def hold(self) -> None:
        """No step that follows another and is begun before `go_on` is computed, unless it is under way. Any thread."""
        self._holds.hold()

    def go_on(self) -> None:
        """Ends `hold`, for steps that are begun from now on."""
        self._holds.go_on()
