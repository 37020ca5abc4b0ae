"""The one place where errors become `google.rpc.Status`, `Failure` messages, and errors again.

A status carries one `ErrorInfo{reason, domain}` whose metadata says whether a retry may help and what is to blame.
Whatever is not a `StaffettaError` leaves the process as INTERNAL with a fixed text: its own text is for the log alone.
"""

import inspect
import logging
from typing import Any, NoReturn, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from staffetta import errors
from staffetta.errors import Code, InternalError, StaffettaError
from staffetta.v1 import common_pb2

log = logging.getLogger(__name__)

ERROR_DOMAIN = "staffetta"

_CLASSES: dict[str, type[StaffettaError]] = {
    member.reason: member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, StaffettaError) and member is not StaffettaError
}

_CLASS_OF_CODE: dict[int, type[StaffettaError]] = {
    Code.CANCELLED: errors.UnavailableError,
    Code.INVALID_ARGUMENT: errors.InvalidRequestError,
    Code.DEADLINE_EXCEEDED: errors.DeadlineError,
    Code.NOT_FOUND: errors.NotFoundError,
    Code.RESOURCE_EXHAUSTED: errors.ExhaustedError,
    Code.FAILED_PRECONDITION: errors.PreconditionError,
    Code.UNAVAILABLE: errors.UnavailableError,
}


def public_error(error: BaseException) -> StaffettaError:
    """`error` itself when its message is meant for callers, else an InternalError that reveals nothing."""
    if isinstance(error, StaffettaError):
        return error
    return InternalError("the request failed on our side; the server's log has the cause under its request id")


def status_of(error: BaseException) -> status_pb2.Status:
    """The `google.rpc.Status` that callers see."""
    public = public_error(error)
    info = error_details_pb2.ErrorInfo(reason=public.reason, domain=ERROR_DOMAIN)
    info.metadata["retryable"] = "true" if public.is_retryable else "false"
    if public.param is not None:
        info.metadata["param"] = public.param
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=int(public.code), message=public.message, details=[detail])


async def abort(context: "grpc.aio.ServicerContext[object, object]", error: BaseException) -> NoReturn:
    """Ends the call with the error's status. Never returns."""
    await context.abort_with_status(rpc_status.to_status(status_of(error)))
    raise InternalError("the call was aborted")


def error_from_rpc(error: grpc.aio.AioRpcError) -> StaffettaError:
    """The error a peer's status stands for; unknown reasons fall back to the class of their code."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
        if status is not None:
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                    return _make(info.reason, status.code, status.message, param=info.metadata.get("param"))
    except (ValueError, DecodeError) as malformed:
        log.warning("a peer's status details contradict its status: %s", malformed)
    code: int = error.code().value[0]
    return _make("", code, error.details() or f"the peer answered {error.code().name}", param=None)


async def error_of_call(call: "grpc.aio.StreamStreamCall[Any, Any]") -> StaffettaError | None:
    """Why a call ended, waiting for its end; None when the server closed it in order."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return None
    details = await call.details()
    initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
    return error_from_rpc(grpc.aio.AioRpcError(code, initial, trailing, details=details))


def failure_of(error: BaseException) -> common_pb2.Failure:
    """The message that carries an error inside a session."""
    public = public_error(error)
    return common_pb2.Failure(
        code=int(public.code), reason=public.reason, message=public.message, is_retryable=public.is_retryable
    )


def error_from_failure(failure: common_pb2.Failure) -> StaffettaError:
    """The error a session's message stands for."""
    return _make(failure.reason, failure.code, failure.message, param=None)


def _make(reason: str, code: int, message: str, *, param: str | None) -> StaffettaError:
    member = _CLASSES.get(reason) or _CLASS_OF_CODE.get(code, InternalError)
    return member(message, param=param)
