"""One HTTP response whose body is a stream of events: its head, its bounded writes, its comments.

Nothing is sent before the first write. From then on, while the engine advances but nothing comes, a comment keeps the
connection alive. Knows nothing of what the events say.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.types import Send

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
    ) -> None:
        self._send = send
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
        """Sends `data`; waits while the client does not read. Raises ClientGoneError when it has not for too long."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._write_timeout_s):
                    await self._write(data)
            except TimeoutError:
                raise ClientGoneError from None
            self._last_write = asyncio.get_running_loop().time()

    async def _write(self, data: bytes) -> None:
        if not self.has_begun:
            self._begun.set()
            raw = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Ends the body."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Writes a comment whenever nothing was written for a while, once begun, unless the engine stands still."""
        task = asyncio.create_task(self._keep_alive(), name="sse-keep-alive")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_alive(self) -> None:
        now = asyncio.get_running_loop().time
        await self._begun.wait()
        while True:
            silence_s = now() - self._last_write
            if silence_s < self._keep_alive_s:
                await asyncio.sleep(self._keep_alive_s - silence_s)
            elif self._placed is None or not self._placed.is_stalled():
                await self.write(_COMMENT)
            else:
                await asyncio.sleep(self._keep_alive_s)
