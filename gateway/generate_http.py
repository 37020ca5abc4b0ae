"""Answers one generation over HTTP, whole or as a stream of events, and ends it when the client leaves.

Nothing is sent before the first output is there, so that errors until then are plain HTTP errors; after that an error
is an event of the stream.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from functools import partial
from typing import Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.body_writer import BodyWriter, body_writer_of
from gateway.event_stream import KEEP_ALIVE_S, ClientGoneError, EventStream
from gateway.fields import parse_object
from gateway.http_error import HttpError, error_body, error_response
from gateway.journey import Journeys
from gateway.json_text import long_to_json, to_json
from gateway.openai_logprobs import Json
from gateway.openai_request import ParsedRequest
from gateway.openai_response import Shape, headers
from gateway.request import Delta, Event, Finished, JourneyRequest, Placed, PromptLogprobs, Started
from staffetta.errors import InternalError, StaffettaError

REQUEST_ID_KEY: Final = "staffetta.request_id"
"""Where the application put the request's internal id into the scope."""
BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""
_DONE: Final = b"data: [DONE]\n\n"

Parse = Callable[[dict[str, object]], ParsedRequest]
MakeShape = Callable[..., Shape]
T = TypeVar("T")

log = logging.getLogger(__name__)


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
        if parsed.is_stream:
            answer = self._stream(journey, parsed, send, body_writer_of(scope))
        else:
            answer = self._whole(journey, parsed, send)
        try:
            await _unless_client_leaves(answer, receive)
        except ClientGoneError:
            log.info("%s: the client left", journey.id)

    async def _whole(self, journey: JourneyRequest, parsed: ParsedRequest, send: Send) -> None:
        deltas: list[Delta] = []
        finished: list[Finished] = []
        try:
            async with aclosing(self._journeys.run(journey)) as events:
                shape = await self._open(parsed, events)
                async for event in events:
                    match event:
                        case Placed():
                            shape.place(event)
                        case PromptLogprobs():
                            shape.score(event.tokens)
                        case Delta():
                            deltas.append(event)
                        case Finished():
                            finished.append(event)
            body = await self._made(parsed, lambda: long_to_json(shape.whole(deltas, finished)))
            extra = headers(finished[-1]) | _ignored_header(parsed)
            response = Response(body, headers=extra, media_type="application/json")
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            response = error_response(_logged(error, journey))
        await response({"type": "http"}, _no_more_input, send)

    async def _stream(
        self, journey: JourneyRequest, parsed: ParsedRequest, send: Send, body: BodyWriter | None
    ) -> None:
        stream = EventStream(send, _ignored_header(parsed), keep_alive_s=self._keep_alive_s, body=body)
        async with stream.watched():
            await self._write_stream(journey, parsed, stream, send)

    async def _write_stream(
        self, journey: JourneyRequest, parsed: ParsedRequest, stream: EventStream, send: Send
    ) -> None:
        sink = _StreamSink(stream)
        try:
            async with (
                aclosing(self._journeys.run(journey, sink=sink)) as events,
                aclosing(self._chunks(parsed, events, stream, sink)) as chunks,
            ):
                async for chunk in chunks:
                    await stream.write(_event(chunk))
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            logged = _logged(error, journey)
            if not stream.has_begun:
                await error_response(logged)({"type": "http"}, _no_more_input, send)
                return
            # No [DONE] after it: what came before is not a whole answer.
            await stream.write(_event(to_json(error_body(logged))))
        else:
            await stream.write(_DONE)
        await stream.end()

    async def _chunks(
        self, parsed: ParsedRequest, events: AsyncIterator[Event], stream: EventStream, sink: "_StreamSink"
    ) -> AsyncGenerator[bytes, None]:
        """The events as encoded chunks; the opening ones wait for the first output: a refusal can be an HTTP error."""
        shape = await self._open(parsed, events)
        finished: list[Finished] = []
        is_open = False
        async for event in events:
            if isinstance(event, Delta | Finished) and not is_open:
                is_open = True
                opening = shape.opening()
                while (chunk := await self._made(parsed, partial(_next_json, opening))) is not None:
                    yield chunk
                sink.begin(shape)
            match event:
                case Placed():
                    shape.place(event)
                    stream.place(event)
                case PromptLogprobs():
                    shape.score(event.tokens)
                case Delta():
                    if (news := shape.delta(event)) is not None:
                        yield news
                case Finished():
                    finished.append(event)
                    yield to_json(shape.finish(event))
        if parsed.has_usage_chunk:
            yield to_json(shape.usage(finished))

    async def _made(self, parsed: ParsedRequest, make: Callable[[], T]) -> T:
        """What `make` returns; off the event loop where a prompt's log-probabilities make it long."""
        return make() if parsed.sampling.prompt_logprobs is None else await self._journeys.in_thread(make)

    async def _open(self, parsed: ParsedRequest, events: AsyncIterator[Event]) -> Shape:
        """The shape of an answer, by the first event."""
        started = await anext(events)
        if not isinstance(started, Started):
            raise InternalError(f"a journey began with {type(started).__name__}")
        return self._make_shape(parsed, started, self._journeys.model.text, created=int(time.time()))


class _StreamSink:
    """Writes text to a stream whose opening is written, where its answer shows nothing but text."""

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream
        self._encode: Callable[[int, str], bytes] | None = None

    def begin(self, shape: Shape) -> None:
        """The opening is on its way; what comes after it may be put here."""
        self._encode = shape.text if shape.is_text_only else None

    def is_open(self) -> bool:
        """Whether it takes text now."""
        return self._encode is not None and self._stream.is_open()

    def put(self, choice_index: int, text: str) -> None:
        """Writes text. Only while it is open."""
        if self._encode is None:
            raise LookupError("the answer has no opening yet")
        self._stream.write_now(_event(self._encode(choice_index, text)))


def _event(chunk: bytes) -> bytes:
    return b"data: %b\n\n" % chunk


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


def _next_json(chunks: Iterator[Json]) -> bytes | None:
    """The next chunk, encoded; None after the last."""
    chunk = next(chunks, None)
    return None if chunk is None else long_to_json(chunk)
