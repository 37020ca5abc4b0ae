"""Turns every error into its HTTP status and body, in OpenAI's shape. The one table from reasons to statuses."""

import json
from typing import Final

from starlette.responses import Response

from staffetta.errors import Code, InvalidRequestError, StaffettaError
from staffetta.rpc.status import public_error

RETRY_AFTER_S: Final = 1

_STATUS_OF_CODE: Final = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.NOT_FOUND: 404,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
_STATUS_OF_REASON: Final = {"UNSUPPORTED": 422}
"""Well-formed, understood, and not to be had here."""

_TYPE_OF_STATUS: Final = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES: Final = {
    "INVALID_REQUEST": None,
    "UNKNOWN_MODEL": "model_not_found",
    "UNSUPPORTED": "unsupported_parameter",
    "QUEUE_FULL": "rate_limit_exceeded",
    "RESOURCE_EXHAUSTED": "rate_limit_exceeded",
}


class HttpError(InvalidRequestError):
    """A mistake that only HTTP knows: a method, a media type, a size."""

    def __init__(self, status: int, message: str, *, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.http_code = code


def http_status(error: StaffettaError) -> int:
    """The status of an answer that is this error."""
    if isinstance(error, HttpError):
        return error.status
    return _STATUS_OF_REASON.get(error.reason) or _STATUS_OF_CODE.get(error.code, 500)


def error_body(error: BaseException) -> dict[str, object]:
    """The body, for an answer or an event of a stream. Reveals nothing of errors that are not meant for callers."""
    public = public_error(error)
    status = http_status(public)
    fallback = "invalid_request_error" if status < 500 else "server_error"
    code = public.http_code if isinstance(public, HttpError) else _CODES.get(public.reason, public.reason.lower())
    return {
        "error": {
            "message": public.message,
            "type": _TYPE_OF_STATUS.get(status, fallback),
            "param": public.param,
            "code": code,
        }
    }


def error_response(error: BaseException) -> Response:
    """The whole answer. Errors that another try may not meet say when to try."""
    public = public_error(error)
    status = http_status(public)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 408:
        # Else the rest of the body could go on arriving for ever.
        headers["connection"] = "close"
    return Response(json.dumps(error_body(public)), status, headers, media_type="application/json")
