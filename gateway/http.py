"""The REST door: paths, request ids, health, readiness, metrics. Generation itself is in `generate_http`.

Every answer carries `x-request-id`: the client's own, or else the one this server uses inside.
Every error, also one of routing, has a body in OpenAI's shape.
"""

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import staffetta
from gateway.event_stream import KEEP_ALIVE_S
from gateway.generate_http import REQUEST_ID_KEY, GenerateEndpoint
from gateway.http_error import HttpError, error_response
from gateway.journey import Journeys
from gateway.metrics import CONTENT_TYPE
from gateway.openai_request import parse_chat, parse_completion
from gateway.openai_response import ChatShape, CompletionShape
from gateway.prepare import check_model
from gateway.request import new_request_id
from staffetta import validate
from staffetta.errors import InvalidRequestError, StaffettaError

log = logging.getLogger(__name__)


def make_app(
    journeys: Journeys,
    scrape: Callable[[], Awaitable[bytes]],
    *,
    max_body_bytes: int,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> ASGIApp:
    """The application. Serves one gateway, whose metrics `scrape` gives; event loop only."""
    chat = GenerateEndpoint(journeys, parse_chat, ChatShape, max_body_bytes=max_body_bytes, keep_alive_s=keep_alive_s)
    completion = GenerateEndpoint(
        journeys, parse_completion, CompletionShape, max_body_bytes=max_body_bytes, keep_alive_s=keep_alive_s
    )
    pages = _Pages(journeys, scrape)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{model}", pages.model),
            Route("/health", pages.health),
            Route("/ready", pages.ready),
            Route("/metrics", pages.metrics),
            Route("/version", pages.version),
        ],
        exception_handlers={HTTPException: _routing_error},
    )
    return _RequestIds(app)


class _Pages:
    """The small answers."""

    def __init__(self, journeys: Journeys, scrape: Callable[[], Awaitable[bytes]]) -> None:
        self._journeys = journeys
        self._scrape = scrape

    async def models(self, request: Request) -> Response:
        """The one model, as a list."""
        del request
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model of that name."""
        try:
            check_model(request.path_params["model"], self._journeys.model)
        except StaffettaError as error:
            return error_response(error)
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """The process is alive; says nothing about workers."""
        del request
        return _json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """Whether a request sent now would be served, and why not."""
        del request
        reason = self._journeys.reason_not_ready()
        if reason is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, request: Request) -> Response:
        """Numbers for a scraper."""
        del request
        try:
            return Response(await self._scrape(), media_type=CONTENT_TYPE)
        except StaffettaError as error:
            return error_response(error)

    async def version(self, request: Request) -> Response:
        """The software's version."""
        del request
        return _json({"version": staffetta.__version__})

    def _model(self) -> dict[str, object]:
        model = self._journeys.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "staffetta",
            "max_model_len": self._journeys.max_model_len(),
        }


class _RequestIds:
    """Gives every request an internal id, and every answer a header by which it can be found."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        internal = scope[REQUEST_ID_KEY] = new_request_id()
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        app, shown = self._app, given or internal
        try:
            validate.check_client_id(given, param="x-request-id")
        except InvalidRequestError as error:
            app, shown = error_response(error), internal

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = shown
            await send(message)

        await app(scope, receive, send_with_id)


async def _routing_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR
    extra: Mapping[str, str] = (isinstance(error, HTTPException) and error.headers) or {}
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"this path does not take {request.method}; it takes {extra.get('Allow', 'another method')}"
        code = "method_not_allowed"
    else:
        message, code = "there is nothing at this path; the API begins at /v1", "unknown_url"
    response = error_response(HttpError(status, message, code=code))
    response.headers.update(extra)
    return response


def _json(value: Mapping[str, object], status: int = HTTPStatus.OK) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")
