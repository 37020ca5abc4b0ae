"""One HTTP response whose body is a stream of events: its head, its bounded writes, its comments.

Nothing is sent before the first write. From then on one task per response watches it: while the engine advances but
nothing comes, a comment keeps the connection alive; a client that leaves a write unread for too long is given up.
A write itself sets no timer: there is one for every token. Knows nothing of what the events say.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.types import Message, Send

from gateway.body_writer import BodyWriter
from gateway.openai_response import DECODE_WORKER
from gateway.request import Placed

KEEP_ALIVE_S: Final = 15.0
WRITE_TIMEOUT_S: Final = 60.0
"""How long a client of a stream may leave everything unread: it holds a place and KV blocks meanwhile."""
_COMMENT: Final = b": keep-alive\n\n"


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


class EventStream:
    """A response whose body is a stream of events. It begins with its first write."""

    def __init__(
        self,
        send: Send,
        extra_headers: dict[str, str],
        *,
        keep_alive_s: float,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        body: BodyWriter | None = None,
    ) -> None:
        """`body` writes without waiting, where the server has that."""
        self._send = send
        self._body = body
        self._now = asyncio.get_running_loop().time
        self._write_timeout_s = write_timeout_s
        self._headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            # Proxies that buffer would hold tokens back.
            "x-accel-buffering": "no",
            **extra_headers,
        }
        self._keep_alive_s = keep_alive_s
        self._turn = asyncio.Lock()
        self._last_write = 0.0
        self._writing_since: float | None = None
        self._has_ended = False
        self._begun = asyncio.Event()
        self._placed: Placed | None = None

    @property
    def has_begun(self) -> bool:
        """Whether anything was sent, so that the status is."""
        return self._begun.is_set()

    def place(self, placed: Placed) -> None:
        """Hears which worker the output will come from."""
        self._placed = placed
        self._headers[DECODE_WORKER] = placed.decode_worker

    async def write(self, data: bytes) -> None:
        """Sends `data`; waits while the client does not read, for as long as who watches the stream allows."""
        await self._put({"type": "http.response.body", "body": data, "more_body": True})

    def is_open(self) -> bool:
        """Whether `write_now` may be called: the body has begun, nothing else is being written, its client reads."""
        return self._body is not None and self._writing_since is None and not self._has_ended and self._body.is_open()

    def write_now(self, data: bytes) -> None:
        """Sends `data` without waiting. Only while it is open."""
        if self._body is None:
            raise LookupError("nothing writes without waiting under this server")
        self._last_write = self._now()
        self._body.write(data)

    async def _put(self, message: Message) -> None:
        async with self._turn:
            self._last_write = self._writing_since = self._now()
            try:
                if not self.has_begun:
                    await self._begin()
                await self._send(message)
            finally:
                self._writing_since = None

    async def _begin(self) -> None:
        self._begun.set()
        raw = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def end(self) -> None:
        """Ends the body."""
        self._has_ended = True
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Watches the stream while the block writes it. Cancels the block and raises ClientGoneError when the client
        has left a write unread for too long."""
        try:
            async with asyncio.timeout(None) as patience:
                task = asyncio.create_task(self._watch(patience), name="sse-watch")
                try:
                    yield
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
        except TimeoutError:
            if not patience.expired():
                raise
            raise ClientGoneError from None

    async def _watch(self, patience: asyncio.Timeout) -> None:
        """Ends `patience` when a write has waited for too long; writes a comment when none came for a while."""
        now = self._now
        await self._begun.wait()
        while self._writing_since is not None or not self._has_ended:
            if self._writing_since is not None:
                left_s = self._writing_since + self._write_timeout_s - now()
                if left_s <= 0:
                    patience.reschedule(now())
                    return
                await asyncio.sleep(left_s)
            elif (silence_s := now() - self._last_write) < self._keep_alive_s:
                # No longer than a write that begins right now may wait.
                await asyncio.sleep(min(self._keep_alive_s - silence_s, self._write_timeout_s))
            elif self._placed is not None and self._placed.is_stalled():
                await asyncio.sleep(min(self._keep_alive_s, self._write_timeout_s))
            else:
                try:
                    async with asyncio.timeout(self._write_timeout_s):
                        await self.write(_COMMENT)
                except TimeoutError:
                    patience.reschedule(now())
                    return
