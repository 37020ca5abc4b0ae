"""Answers one generation over HTTP, whole or as a stream of events, and ends it when the client leaves.

Nothing is sent before the first output is there, so that errors until then are plain HTTP errors; after that an error
is an event of the stream. From then on, while the engine advances but nothing comes, a comment keeps the connection
alive.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.fields import parse_object
from gateway.http_error import HttpError, error_body, error_response
from gateway.journey import Journeys
from gateway.openai_request import ParsedRequest
from gateway.openai_response import DECODE_WORKER, Json, Shape, headers
from gateway.request import Delta, Event, Finished, JourneyRequest, Placed, Started
from staffetta.errors import StaffettaError

REQUEST_ID_KEY: Final = "staffetta.request_id"
"""Where the application put the request's internal id into the scope."""
KEEP_ALIVE_S: Final = 15.0
WRITE_TIMEOUT_S: Final = 60.0
"""How long a client of a stream may leave everything unread: it holds a place and KV blocks meanwhile."""
BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""
_COMMENT: Final = b": keep-alive\n\n"
_DONE: Final = b"data: [DONE]\n\n"

Parse = Callable[[dict[str, object]], ParsedRequest]
MakeShape = Callable[..., Shape]

log = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


class GenerateEndpoint:
    """One path of the API, as an ASGI application. Stateless; event loop only."""

    def __init__(
        self,
        journeys: Journeys,
        parse: Parse,
        make_shape: MakeShape,
        *,
        max_body_bytes: int,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._journeys = journeys
        self._parse = parse
        self._make_shape = make_shape
        self._max_body_bytes = max_body_bytes
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        request = Request(scope, receive)
        arrival = asyncio.get_running_loop().time()
        try:
            with self._journeys.admission.held():
                body = await read_body(request, self._max_body_bytes)
            parsed = self._parse(parse_object(body))
        except StaffettaError as error:
            await error_response(error)(scope, receive, send)
            return
        except ClientDisconnect:
            log.info("%s: the client left before its body was whole", scope[REQUEST_ID_KEY])
            return
        journey = JourneyRequest(
            id=scope[REQUEST_ID_KEY],
            model=parsed.model,
            prompt=parsed.prompt,
            sampling=parsed.sampling,
            arrival=arrival,
            default_max_tokens=parsed.default_max_tokens,
            on_prefill_failure=parsed.on_prefill_failure,
        )
        answer = self._stream(journey, parsed, send) if parsed.is_stream else self._whole(journey, parsed, send)
        try:
            await _unless_client_leaves(answer, receive)
        except ClientGoneError:
            log.info("%s: the client left", journey.id)

    async def _whole(self, journey: JourneyRequest, parsed: ParsedRequest, send: Send) -> None:
        deltas: list[Delta] = []
        shape: Shape | None = None
        response = None
        try:
            async with aclosing(self._journeys.run(journey)) as events:
                async for event in events:
                    match event:
                        case Started():
                            shape = self._shape(parsed, event)
                        case Delta():
                            deltas.append(event)
                        case Finished() if shape is not None:
                            body = _to_json(shape.whole(deltas, event))
                            extra = headers(event) | _ignored_header(parsed)
                            response = Response(body, headers=extra, media_type="application/json")
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            response = error_response(_logged(error, journey))
        if response is not None:
            await response({"type": "http"}, _no_more_input, send)

    async def _stream(self, journey: JourneyRequest, parsed: ParsedRequest, send: Send) -> None:
        stream = EventStream(send, _ignored_header(parsed), keep_alive_s=self._keep_alive_s)
        try:
            async with (
                stream.kept_alive(),
                aclosing(self._journeys.run(journey)) as events,
                aclosing(self._chunks(parsed, events, stream)) as chunks,
            ):
                async for chunk in chunks:
                    await stream.write(b"data: " + _to_json(chunk) + b"\n\n")
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            logged = _logged(error, journey)
            if not stream.has_begun:
                await error_response(logged)({"type": "http"}, _no_more_input, send)
                return
            # No [DONE] after it: what came before is not a whole answer.
            await stream.write(b"data: " + _to_json(error_body(logged)) + b"\n\n")
        else:
            await stream.write(_DONE)
        await stream.end()

    async def _chunks(
        self, parsed: ParsedRequest, events: AsyncIterator[Event], stream: "EventStream"
    ) -> AsyncGenerator[Json, None]:
        """The events as chunks; the opening one waits for the first output, so that a refusal can be an HTTP error."""
        shape: Shape | None = None
        opening: Json | None = None
        async for event in events:
            if isinstance(event, Started):
                shape = self._shape(parsed, event)
                opening = shape.first()
                continue
            if isinstance(event, Placed):
                stream.place(event)
                continue
            if shape is None:
                continue
            if opening is not None:
                yield opening
                opening = None
            if isinstance(event, Delta):
                if (chunk := shape.delta(event)) is not None:
                    yield chunk
            else:
                yield shape.finish(event)
                if parsed.has_usage_chunk:
                    yield shape.usage(event)

    def _shape(self, parsed: ParsedRequest, started: Started) -> Shape:
        return self._make_shape(parsed, started, self._journeys.model.text, created=int(time.time()))


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


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON request.

    Raises HttpError for another media type, too many bytes, without reading those, or too long a wait for them;
    ClientDisconnect when the client leaves.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(415, "the content-type is not application/json; set that header", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if not (declared.isdecimal() and int(declared) > max_bytes):
                async for part in request.stream():
                    body += part
                    if len(body) > max_bytes:
                        break
                else:
                    return bytes(body)
    except TimeoutError:
        raise HttpError(
            408, f"the body was not whole after {BODY_TIMEOUT_S:g} s; send it faster", code="request_timeout"
        ) from None
    raise HttpError(413, f"the body has more than {max_bytes} bytes; shorten it", code="request_too_large")


async def _unless_client_leaves(answer: Coroutine[None, None, None], receive: Receive) -> None:
    """Runs `answer`, and cancels it when the connection ends. Raises ClientGoneError then."""
    watch = asyncio.create_task(_disconnect(receive), name="client-watch")
    work = asyncio.create_task(answer, name="answer")
    try:
        await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError
        await work
    finally:
        for task in (watch, work):
            task.cancel()
        await asyncio.gather(watch, work, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _no_more_input() -> Message:
    raise HttpError(400, "the body was read", code="invalid_request_error")


def _ignored_header(parsed: ParsedRequest) -> dict[str, str]:
    return {"staffetta-ignored-params": ", ".join(parsed.ignored)} if parsed.ignored else {}


def _logged(error: Exception, journey: JourneyRequest) -> Exception:
    if isinstance(error, StaffettaError):
        log.info("%s: %s: %s", journey.id, error.reason, error.message)
    else:
        log.error("%s: an error that has no name", journey.id, exc_info=error)
    return error


def _to_json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
