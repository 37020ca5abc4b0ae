"""Serves one session stream from its opening to its end, the same way for gateways and decode workers."""

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio

from staffetta.errors import StaffettaError
from staffetta.rpc.session import Numbered, SessionPipe
from staffetta.rpc.status import abort

log = logging.getLogger(__name__)

S = TypeVar("S")
In = TypeVar("In", bound=Numbered)
Out = TypeVar("Out", bound=Numbered)


async def serve_session(
    pipe: SessionPipe[In, Out],
    context: "grpc.aio.ServicerContext[Any, Any]",
    *,
    opening: Awaitable[S],
    consume: Callable[[S], Coroutine[Any, Any, None]],
    make_heartbeat: Callable[[], Out],
    close: Callable[[S], None],
) -> None:
    """Awaits `opening`, then runs the session until its stream ends or fails; what was opened is closed in any case.

    The peer is told why by the call's status; of what is not a StaffettaError it learns no more than that.
    """
    session: S | None = None
    try:
        session = await opening
        await pipe.run(consume(session), make_heartbeat=make_heartbeat)
    except Exception as error:
        if not isinstance(error, StaffettaError):
            log.exception("a session ended unexpectedly")
        await abort(context, error)
    finally:
        if session is not None:
            close(session)
