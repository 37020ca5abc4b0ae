"""Completions over HTTP/1.1 with server-sent events, for any server that has OpenAI's API.

An asyncio protocol over httptools' compiled parser, which the gateway has anyway: a few microseconds for each event.
General HTTP clients wrap every chunk in several coroutines, several times that; on two cores the server would pay.
Events are kept as bytes with their times and parsed when the phase is over.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, Final, cast

import httptools

from bench.record import Record
from bench.target import TargetError

CONNECT_TIMEOUT_S: Final = 10.0
OPEN_TIMEOUT_S: Final = 10.0
_END_OF_EVENT: Final = b"\n\n"


class HttpTarget:
    """See `bench.target.Target`. Keeps finished connections and uses them again."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self._name = name
        self._host = host
        self._port = port
        self._model = ""
        self._idle: list[_Connection] = []

    @property
    def name(self) -> str:
        """What tables call it."""
        return self._name

    async def open(self) -> None:
        """Asks which model is served; the first one is measured."""
        connection = await self._connect()
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                response = await connection.exchange(self._head("GET", "/v1/models", 0))
        except TimeoutError as error:
            raise TargetError(f"{self._name} has not listed its models after {OPEN_TIMEOUT_S:g} s") from error
        finally:
            connection.close()
        try:
            self._model = str(json.loads(response.body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise TargetError(f"{self._name} lists no model: {response.body[:200]!r}") from error

    async def complete(self, prompt: Sequence[int], output_tokens: int, *, due_s: float) -> "HttpAnswer":
        """Streams one completion to its end."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": list(prompt),
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            separators=(",", ":"),
        ).encode()
        while self._idle and not self._idle[-1].is_open:
            self._idle.pop()
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            response = await connection.exchange(self._head("POST", "/v1/completions", len(body)) + body)
        except BaseException:
            connection.close()
            raise
        if response.keeps_alive:
            self._idle.append(connection)
        else:
            connection.close()
        if response.status != 200:
            raise TargetError(f"{self._name} answered {response.status}: {response.body[:300]!r}")
        return HttpAnswer(self._name, response, due_s=due_s, output_tokens=output_tokens)

    async def close(self) -> None:
        """Closes the kept connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(_Connection, self._host, self._port)
        except (OSError, TimeoutError) as error:
            raise TargetError(f"{self._name} cannot be reached at {self._host}:{self._port}: {error}") from error
        return connection

    def _head(self, method: str, path: str, length: int) -> bytes:
        return (
            f"{method} {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\naccept: text/event-stream\r\n"
            f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        ).encode()


class HttpAnswer:
    """One streamed completion: the body's pieces and when each came."""

    def __init__(self, name: str, response: "_Response", *, due_s: float, output_tokens: int) -> None:
        self._name = name
        self._response = response
        self._due_s = due_s
        self._output_tokens = output_tokens

    def record(self) -> Record:
        """What came when. Every event that carries text is an arrival; the usage at the end counts the tokens.

        A server that does not tell the usage is believed to have sent what was asked for: the end token is ignored.
        """
        arrivals: list[float] = []
        counted: int | None = None
        for moment, event in self._events():
            if "error" in event:
                raise TargetError(f"{self._name} broke off: {event['error']}")
            choices = event.get("choices") or [{}]
            if choices[0].get("text"):
                arrivals.append(moment)
            usage = event.get("usage")
            if usage is not None:
                counted = int(usage["completion_tokens"])
        if not arrivals or counted not in (None, self._output_tokens):
            raise TargetError(
                f"{self._name} sent {counted} tokens in {len(arrivals)} events, asked for {self._output_tokens}"
            )
        return Record(self._due_s, tuple(arrivals), self._output_tokens)

    def _events(self) -> list[tuple[float, dict[str, Any]]]:
        """The JSON of each event, and when its last byte came."""
        events: list[tuple[float, dict[str, Any]]] = []
        rest = b""
        for moment, piece in self._response.pieces:
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(_END_OF_EVENT)
            for event in whole:
                data = event.removeprefix(b"data:").strip()
                if event.startswith(b"data:") and data != b"[DONE]":
                    events.append((moment, json.loads(data)))
        return events


class _Response:
    """A response as it grows. `pieces` are the body's parts with their moments."""

    def __init__(self) -> None:
        self.status = 0
        self.keeps_alive = False
        self.pieces: list[tuple[float, bytes]] = []

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(piece for _, piece in self.pieces)


class _Connection(asyncio.Protocol):
    """One connection; one exchange at a time. The parser calls the `on_…` methods while it is fed."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response = _Response()
        self._done: asyncio.Future[_Response] | None = None
        self._now = 0.0

    @property
    def is_open(self) -> bool:
        """Whether another exchange may be tried."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes) -> _Response:
        """Sends a request and returns its whole response. Raises TargetError when the connection is lost before."""
        if self._transport is None:
            raise TargetError("the connection is closed")
        self._response = _Response()
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        """Closes the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast("asyncio.Transport", transport)  # what stream connections have; uvloop's has no base

    def data_received(self, data: bytes) -> None:
        """asyncio's. The moment is taken before anything is looked at."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._transport = None
        self._fail(f"the connection was lost: {exc}" if exc else "the connection was closed")

    def on_headers_complete(self) -> None:
        """The parser's."""
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """The parser's."""
        self._response.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        """The parser's."""
        self._response.keeps_alive = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._response)

    def _fail(self, why: str) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(TargetError(why))
