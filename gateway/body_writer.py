"""Writes to an answer under way without a task switch: uvicorn's HTTP protocol, opened by one method.

ASGI's `send` is a coroutine for each message. Where thousands of tokens a second go out, the switch to the task that
awaits it costs more than everything else; so an answer whose body has begun may also be written to from a callback.
Back-pressure is the protocol's own: while the transport holds more than its limit, nothing is taken here.
"""

from typing import Final, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_EXTENSION: Final = "staffetta.body_writer"


class BodyWriter:
    """The body of one answer. Event loop only."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def is_open(self) -> bool:
        """Whether a chunk would go out now: the body has begun, has not ended, and its client reads."""
        cycle = self._cycle
        return (
            cycle.response_started
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
            and cycle.chunked_encoding is True
        )

    def write(self, data: bytes) -> None:
        """Sends `data`, which is not empty, as one chunk. Only while it is open."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class BodyWriterProtocol(HttpToolsProtocol):
    """One connection, as uvicorn serves it; every request's scope has a writer."""

    def on_headers_complete(self) -> None:
        """Called by the parser. The application has a task by then, which has not begun."""
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            extensions = cast("dict[str, object]", self.scope.setdefault("extensions", {}))
            extensions[_EXTENSION] = BodyWriter(self.cycle)


def body_writer_of(scope: Scope) -> BodyWriter | None:
    """The writer of a request's answer; None under another server."""
    found = scope.get("extensions", {}).get(_EXTENSION)
    return found if isinstance(found, BodyWriter) else None
