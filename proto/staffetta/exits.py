"""How a command ends: its exit code, and what it tells the person who started it when it cannot go on.

Failures of single requests are in `staffetta.errors`; these are failures of a process to start or to run. `run` is the
one place that turns them into text and code, so that nobody reads a traceback for a mistake of their own. It never
hides a defect: whatever is not an `OperatorError` keeps its traceback.
"""

import sys
from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell sees."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    DOES_NOT_FIT = 3
    MODEL_NOT_FOUND = 4
    PORT_OR_PEER = 5


REPEATING = frozenset({ExitCode.USAGE, ExitCode.DOES_NOT_FIT, ExitCode.MODEL_NOT_FOUND, ExitCode.PORT_OR_PEER})
"""Codes whose cause a restart does not remove: a supervisor passes them on instead of trying again."""


class OperatorError(Exception):
    """A process cannot do what it was told.

    `name` is upper snake case; `what` and `why` say it with the numbers; `fix` is a line to paste.
    """

    exit_code: ExitCode = ExitCode.FAILURE

    def __init__(self, name: str, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.name = name
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"error[{self.name}]: {self.what}\n  {self.why}\n  fix: {self.fix}"


class UsageError(OperatorError):
    """The command line, a variable or a configuration file is wrong."""

    exit_code = ExitCode.USAGE


class DoesNotFitError(OperatorError):
    """Model, cache and buffers need more memory than there is."""

    exit_code = ExitCode.DOES_NOT_FIT


class ModelNotFoundError(OperatorError):
    """There is no model of that name, or its directory lacks something."""

    exit_code = ExitCode.MODEL_NOT_FOUND


class PortError(OperatorError):
    """An address cannot be listened on, or a peer cannot be reached."""

    exit_code = ExitCode.PORT_OR_PEER


def run(command: Callable[[], int]) -> int:
    """Runs `command` and returns the process's exit code; prints an OperatorError on standard error."""
    try:
        return command()
    except OperatorError as error:
        print(error, file=sys.stderr, flush=True)  # noqa: T201 (the one place that speaks to the operator)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output left (`staffetta config show | head`); there is nobody to tell.
        sys.stderr.close()
        return ExitCode.FAILURE
    except KeyboardInterrupt:
        return ExitCode.FAILURE
