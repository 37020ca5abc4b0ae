"""The exception tree of the whole project: a canonical code and a reason for every way a request can fail.

Two levels: a class per canonical code, a subclass per reason. `staffetta.rpc.status` turns members into
`google.rpc.Status`; the gateway turns the same members into the REST body. Messages are written for the caller: what,
why, the exact fix; never exception text, paths or addresses.
"""

from enum import IntEnum
from typing import ClassVar


class Code(IntEnum):
    """Canonical gRPC status codes, by number, so that this module imports no grpc."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class StaffettaError(Exception):
    """A failure with a code, a reason and a message for whoever sent the request.

    `param` names the offending request field when one is to blame.
    """

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(StaffettaError):
    """The request can never succeed as it is."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class ContextLengthExceededError(InvalidRequestError):
    """Prompt and requested tokens do not fit the model's context."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class TemplateError(InvalidRequestError):
    """The chat template refused the messages or ran out of its bounds."""

    reason = "TEMPLATE_REFUSED"


class UnsupportedError(InvalidRequestError):
    """The request asks for something this system does not have."""

    reason = "UNSUPPORTED"


class NotFoundError(StaffettaError):
    """Something the request names does not exist."""

    code = Code.NOT_FOUND
    reason = "NOT_FOUND"


class UnknownModelError(NotFoundError):
    """No served model has that name."""

    reason = "UNKNOWN_MODEL"


class PreconditionError(StaffettaError):
    """Two parts of the system do not fit together."""

    code = Code.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class IncompatiblePeerError(PreconditionError):
    """A session was refused; the message names the field and both values."""

    reason = "INCOMPATIBLE_PEER"


class ProtocolError(PreconditionError):
    """A peer broke the order of a session: a gap in its numbers, a command before the opening."""

    reason = "PROTOCOL_VIOLATION"


class ExhaustedError(StaffettaError):
    """A bound was reached; the same request may succeed later."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "RESOURCE_EXHAUSTED"
    is_retryable = True


class QueueFullError(ExhaustedError):
    """The worker or gateway holds as many requests as it may."""

    reason = "QUEUE_FULL"


class UnavailableError(StaffettaError):
    """Nobody can serve the request now."""

    code = Code.UNAVAILABLE
    reason = "UNAVAILABLE"
    is_retryable = True


class NoWorkerError(UnavailableError):
    """No registered worker can take the request."""

    reason = "NO_WORKER"


class WorkerLostError(UnavailableError):
    """The worker that ran the request is gone."""

    reason = "WORKER_LOST"


class HandoffFailedError(UnavailableError):
    """The hand-off failed and the request's policy forbids recomputing, or nobody may recompute."""

    reason = "HANDOFF_FAILED"


class TransportError(UnavailableError):
    """A transport could not bring the blocks: no connection, a broken one, a refused ticket. The pool is unharmed."""

    reason = "TRANSPORT_FAILED"


class CorruptBlockError(UnavailableError):
    """A block that was read is not the block that was announced; it must be read again or recomputed."""

    reason = "CORRUPT_BLOCK"


class DrainingError(UnavailableError):
    """The worker takes no new requests because it is about to end."""

    reason = "DRAINING"


class DeadlineError(StaffettaError):
    """The deadline passed; the message names the phase."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class InternalError(StaffettaError):
    """A defect on our side ended this request; nothing of it leaks into the message."""


class StepFailedError(InternalError):
    """The step that computed this request raised; others went on."""

    reason = "STEP_FAILED"
