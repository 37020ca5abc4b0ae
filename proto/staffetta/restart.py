"""Decides what follows when a child process ends: start it again, after how long, or give up. No I/O, no clock."""

import signal
from dataclasses import dataclass
from typing import Final

from staffetta.exits import REPEATING, ExitCode

STEADY_S: Final = 10.0
"""A process that lived this long ended for a reason of its own, not because of how it was started."""

MAX_EARLY_ENDS: Final = 3
"""Ends before the system was ready for the first time, after which it never will be."""

_FIRST_DELAY_S: Final = 0.1
_MAX_DELAY_S: Final = 5.0


@dataclass(slots=True)
class Backoff:
    """Delays of one process's restarts: none after a long life, else doubling from 0.1 s to 5 s."""

    num_failures: int = 0

    def next_delay(self, lived_s: float) -> float:
        """Seconds to wait after a life of `lived_s`."""
        if lived_s >= STEADY_S:
            self.num_failures = 0
        self.num_failures += 1
        if self.num_failures == 1:
            return 0.0
        return min(_FIRST_DELAY_S * 2.0 ** min(self.num_failures - 2, 10), _MAX_DELAY_S)


def describe_status(status: int) -> str:
    """Words for an exit code, or for minus the number of a signal."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def final_code(status: int, *, num_early_ends: int) -> ExitCode | None:
    """The whole command's exit code when a restart is pointless, else None."""
    if status in REPEATING:
        return ExitCode(status)
    return ExitCode.FAILURE if num_early_ends >= MAX_EARLY_ENDS else None
