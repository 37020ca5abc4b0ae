"""Errors cross the wire and come back as what they were; nothing else of a process does."""

import inspect

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from staffetta import errors
from staffetta.errors import (
    Code,
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    StaffettaError,
    UnavailableError,
)
from staffetta.rpc.status import (
    ERROR_DOMAIN,
    error_from_failure,
    error_from_rpc,
    failure_of,
    public_error,
    status_of,
)

EVERY_ERROR = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, StaffettaError) and member is not StaffettaError
]


def make_rpc_error(status: status_pb2.Status) -> grpc.aio.AioRpcError:
    """What a client raises when a server ends its call with `status`."""
    made = rpc_status.to_status(status)
    metadata = grpc.aio.Metadata(*made.trailing_metadata)
    return grpc.aio.AioRpcError(made.code, grpc.aio.Metadata(), metadata, details=made.details)


def make_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return info


def test_every_reason_names_exactly_one_class() -> None:
    reasons = [member.reason for member in EVERY_ERROR]
    assert len(reasons) == len(set(reasons)), sorted(reasons)


@pytest.mark.parametrize("member", EVERY_ERROR, ids=lambda member: member.reason)
@pytest.mark.parametrize("param", [None, "max_tokens"])
def test_every_error_survives_a_status(member: type[StaffettaError], param: str | None) -> None:
    error = error_from_rpc(make_rpc_error(status_of(member("what, why, the fix: 100 % of it – ü", param=param))))
    assert type(error) is member
    assert (error.message, error.param) == ("what, why, the fix: 100 % of it – ü", param)


@pytest.mark.parametrize("member", EVERY_ERROR, ids=lambda member: member.reason)
def test_every_error_survives_a_session_message(member: type[StaffettaError]) -> None:
    failure = failure_of(member("what"))
    assert (failure.code, failure.reason, failure.message) == (member.code, member.reason, "what")
    assert failure.is_retryable is member.is_retryable
    assert type(error_from_failure(failure)) is member


def test_a_status_carries_one_error_info_with_reason_domain_and_metadata() -> None:
    info = make_info(status_of(QueueFullError("full", param="prompt")))
    assert (info.reason, info.domain) == ("QUEUE_FULL", ERROR_DOMAIN)
    assert dict(info.metadata) == {"retryable": "true", "param": "prompt"}
    assert dict(make_info(status_of(InvalidRequestError("no"))).metadata) == {"retryable": "false"}


SECRETS = [
    ValueError("/home/operator/model at 10.1.2.3:4"),
    KeyError("api-key-of-somebody"),
    ExceptionGroup("several", [OSError("/etc/passwd")]),
]


@pytest.mark.parametrize("error", SECRETS, ids=lambda error: type(error).__name__)
def test_an_unknown_exception_reveals_nothing(error: BaseException) -> None:
    status, failure = status_of(error), failure_of(error)
    fixed = "the request failed on our side; the server's log has the cause under its request id"
    assert (status.code, status.message) == (Code.INTERNAL, fixed)
    assert (failure.code, failure.reason, failure.message) == (Code.INTERNAL, "INTERNAL", fixed)
    for secret in ("operator", "10.1.2.3", "api-key", "passwd", "ValueError", "KeyError"):
        assert secret.encode() not in status.SerializeToString() + failure.SerializeToString()


def test_an_error_for_callers_is_passed_on_as_it_is() -> None:
    error = DeadlineError("too late")
    assert public_error(error) is error


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ExhaustedError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNIMPLEMENTED, InternalError),
        (grpc.StatusCode.DATA_LOSS, InternalError),
    ],
)
def test_a_status_without_details_becomes_the_class_of_its_code(
    code: grpc.StatusCode, expected: type[StaffettaError]
) -> None:
    plain = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=None)
    error = error_from_rpc(plain)
    assert type(error) is expected
    assert error.message == f"the peer answered {code.name}"


def test_an_unknown_reason_becomes_the_class_of_its_code() -> None:
    status = status_of(QueueFullError("full"))
    info = make_info(status)
    info.reason = "REASON_OF_A_LATER_VERSION"
    status.details[0].Pack(info)
    error = error_from_rpc(make_rpc_error(status))
    assert type(error) is ExhaustedError
    assert error.message == "full"


def test_the_reasons_of_another_domain_are_not_ours() -> None:
    status = status_of(QueueFullError("full"))
    info = make_info(status)
    info.domain = "somebody.else"
    status.details[0].Pack(info)
    assert type(error_from_rpc(make_rpc_error(status))) is ExhaustedError


@pytest.mark.parametrize(
    "details",
    [
        pytest.param(b"\xff\xff\xff not a status", id="garbage"),
        pytest.param(status_of(QueueFullError("other")).SerializeToString(), id="contradicting"),
        pytest.param(status_pb2.Status(code=99, message="down").SerializeToString(), id="no code"),
    ],
)
def test_malformed_status_details_are_ignored(details: bytes) -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", details))
    error = error_from_rpc(
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, details="down")
    )
    assert type(error) is UnavailableError
    assert error.message == "down"


def test_an_undecodable_error_info_is_ignored() -> None:
    status = status_of(QueueFullError("full"))
    status.details[0].value = b"\xff\xff\xff"
    assert type(error_from_rpc(make_rpc_error(status))) is ExhaustedError
