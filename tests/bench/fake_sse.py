"""A server that answers completions with bytes that a test chose: each element of `body` is written by itself."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

MODELS = b'{"data":[{"id":"served"}]}'
DONE = b"data: [DONE]\n\n"


def event(text: str) -> bytes:
    """A completion's chunk."""
    return b'data: {"choices":[{"text":"%s"}]}\n\n' % text.encode()


def usage(tokens: int) -> bytes:
    """The chunk at the end that counts."""
    return b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens


@dataclass
class FakeServer:
    """What the server says and what it heard. `body` None closes the connection in the middle of an answer."""

    body: Sequence[bytes] | None = ()
    status: str = "200 OK"
    models: bytes = MODELS
    keeps_alive: bool = True
    bodies: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0
    handlers: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles one connection in a task that the end of the test waits for."""
        self.handlers.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                self.bodies.append(await reader.readexactly(length))
                is_models = head.startswith(b"GET /v1/models ")
                await self._answer(writer, (self.models,) if is_models else self.body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is done
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: Sequence[bytes] | None) -> None:
        connection = "keep-alive" if self.keeps_alive else "close"
        head = f"HTTP/1.1 {self.status}\r\nconnection: {connection}\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        for piece in (event("a"),) if body is None else body:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0)
        if body is None:
            raise ConnectionResetError
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def running(fake: FakeServer) -> AsyncIterator[FakeServer]:
    """Serves on a free port for the length of the block."""
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        async with asyncio.timeout(5):  # every connection is closed by now, or the client leaks one
            await asyncio.gather(*fake.handlers)
