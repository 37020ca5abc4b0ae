"""How a child's life ended, and whether another is worth a try. Pure."""

import errno
from typing import Final

from staffetta.exits import REPEATING, ExitCode, OperatorError
from staffetta.restart import MAX_EARLY_ENDS, describe_status

MAX_EARLY_ENDS_LATER: Final = 10
"""Lives in a row that ended before they served, in a gateway that once served: half a minute, by the delays between
them. Meanwhile the kernel gives this child its share of new connections, and they wait; a gateway that never gets it
back must end, so that its supervisor starts another."""


class ChildEndedError(OperatorError):
    """A child has ended; raised when the next one would too."""

    def __init__(self, index: int, status: int) -> None:
        self.how = describe_status(status)
        super().__init__(
            "GATEWAY_PROCESS",
            f"process {index} of the gateway ended by {self.how}",
            why="it has said why itself, above; another one would end as well",
            fix="staffetta gateway --log-level debug",
        )
        self.repeats = status in REPEATING
        self.exit_code = ExitCode(status) if self.repeats else ExitCode.FAILURE


class ChildNotStartedError(OperatorError):
    """The system has no room for a child."""

    repeats = True

    def __init__(self, index: int, error: OSError) -> None:
        self.how = errno.errorcode.get(error.errno or 0, "OSError")
        super().__init__(
            "GATEWAY_PROCESS",
            f"process {index} of the gateway cannot be started: {error}",
            why="it needs memory, a process and some file descriptors, each of which has a limit",
            fix="ulimit -n 65536; ulimit -u unlimited",
        )


ChildEnd = ChildEndedError | ChildNotStartedError


def is_final_at_start(end: ChildEnd, *, num_early_ends: int) -> bool:
    """Whether a gateway that is being started never will be."""
    return end.repeats or num_early_ends >= MAX_EARLY_ENDS


def is_final_later(*, num_early_ends: int) -> bool:
    """Whether a gateway that has served must end."""
    return num_early_ends >= MAX_EARLY_ENDS_LATER
