"""Serves `DecodeService`: one session per gateway carries every request's commands in and every step's tokens out.

The life of a request, seen from here:

1. `StartRequest` (and `AppendPrompt` for long prompts) arrives; it is validated again and goes to the engine.
2. The engine prefills it or asks the `HandoffSource`; what a prefill worker sends, log-probabilities of the prompt and
   the first token of each choice, leaves at once, while its KV is still in flight.
3. The output of every step comes back to the event loop and leaves as one message per session.
4. `Grant` lets a choice go on, `CancelRequest` stops it or all, and so does the session's end; one event carries each
   choice's ending.

It never decides about tokens and never waits for a gateway to read.
"""

import asyncio
import logging
import secrets
import time
from concurrent.futures import Future
from itertools import count
from typing import Any

import grpc.aio

from decode_svc.active import ActiveRequest, GatewaySession, News, Pipe
from decode_svc.source import HandoffSource, Route
from engine.request import (
    FinishReason,
    PromptToken,
    Request,
    RequestId,
    RequestKind,
    SampledToken,
    StepOutput,
)
from staffetta import validate
from staffetta.errors import (
    DrainingError,
    HandoffFailedError,
    IncompatiblePeerError,
    ProtocolError,
    StaffettaError,
)
from staffetta.rpc.session import SessionPipe
from staffetta.rpc.status import public_error
from staffetta.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from worker.admission import PromptParts, check_room
from worker.codec import choices_from_proto, sampling_from_proto
from worker.pairing import check_protocol
from worker.rank import Rank
from worker.sessions import serve_session

log = logging.getLogger(__name__)


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """All sessions of one decode worker. Event loop only, except `on_output`, which the engine thread calls."""

    def __init__(self, rank: Rank, *, max_requests: int, heartbeat_s: float) -> None:
        self._rank = rank
        self._max_requests = max_requests
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._arrivals = count()
        self._sessions: set[GatewaySession] = set()
        self._active: dict[RequestId, ActiveRequest] = {}
        self._source: HandoffSource | None = None
        self._is_draining = False

    def use(self, source: HandoffSource) -> None:
        """Connects the hand-offs; once, before the server starts."""
        self._source = source

    @property
    def source(self) -> HandoffSource:
        """The hand-offs."""
        assert self._source is not None, "use() comes before serving"
        return self._source

    # Sessions

    async def Session(  # type: ignore[override]  # noqa: N802 (reads and writes its context instead of yielding)
        self, request_iterator: object, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Serves one gateway until its stream ends; then cancels everything it had."""
        pipe: Pipe = SessionPipe(context.read, context.write, heartbeat_s=self._heartbeat_s)
        await serve_session(
            pipe,
            context,
            opening=self._open(pipe),
            consume=self._consume,
            make_heartbeat=self._heartbeat,
            close=self._close,
        )

    async def _open(self, pipe: Pipe) -> GatewaySession:
        first = await pipe.receive()
        if first is None or first.WhichOneof("command") != "open":
            raise ProtocolError("the first message of a session must open it")
        check_protocol(first.open.protocol_version)
        ours = self._rank.identity.model_digest
        if first.open.model_digest != ours:
            raise IncompatiblePeerError(
                f"model_digest is {first.open.model_digest} at the gateway and {ours} here; give both the same model"
            )
        pipe.expect_heartbeats(first.open.heartbeat_s)
        session = GatewaySession(secrets.token_hex(16), first.open.gateway_id, pipe)
        self._sessions.add(session)
        opened = decode_pb2.DecodeSessionOpened(
            session_id=session.session_id,
            identity=self._rank.identity,
            max_model_len=self._rank.request_limits.max_model_len,
            max_requests=self._max_requests,
            heartbeat_s=self._heartbeat_s,
        )
        pipe.send(decode_pb2.DecodeSessionResponse(opened=opened))
        log.info("session %s opened by gateway %s", session.session_id, session.gateway_id)
        return session

    def _close(self, session: GatewaySession) -> None:
        self._sessions.discard(session)
        for request_id in tuple(session.request_ids):
            self._forget(self._active[request_id])
            self._cancel(request_id)
        log.info("session %s of gateway %s ended", session.session_id, session.gateway_id)

    async def _consume(self, session: GatewaySession) -> None:
        while (message := await session.pipe.receive()) is not None:
            match message.WhichOneof("command"):
                case "start":
                    self._start(session, message.start)
                case "append_prompt":
                    self._append(session, message.append_prompt)
                case "grant":
                    self._grant(session, message.grant)
                case "cancel":
                    self._cancel_for(session, message.cancel)
                case "heartbeat":
                    pass
                case other:
                    raise ProtocolError(f"command {other} has no place in an open session")

    def _heartbeat(self) -> decode_pb2.DecodeSessionResponse:
        self._rank.engine_thread.turn()
        return decode_pb2.DecodeSessionResponse(
            heartbeat=common_pb2.Heartbeat(
                engine_turns=self._rank.engine_thread.num_turns, num_requests=len(self._active)
            )
        )

    # From the gateway to the engine

    def _start(self, session: GatewaySession, start: decode_pb2.StartRequest) -> None:
        request_id = RequestId(start.request_id)
        if request_id in self._active:
            raise ProtocolError(f"request {request_id} was started twice")
        route = Route(
            preferred=start.prefill_worker,
            may_recover=start.on_prefill_failure != common_pb2.PREFILL_FAILURE_POLICY_FAIL,
            sampling=start.sampling,
        )
        choices = choices_from_proto(
            start.sampling, first_token_index=start.first_token_index, choice_index=start.choice_index
        )
        active = ActiveRequest(
            session, start, choices, route.record, self._rank.identity.worker_id, started_at=time.monotonic()
        )
        self._active[request_id] = active
        session.request_ids.add(request_id)
        self.source.add_route(request_id, route)
        try:
            if self._is_draining:
                raise DrainingError(f"{self._rank.identity.worker_id} is draining; another worker can take the request")
            check_room(len(choices), self.num_choices(), self._max_requests)
            validate.check_start(start, self._rank.request_limits)
            active.prompt = PromptParts(start.num_prompt_tokens, start.token_ids, self._rank.request_limits)
        except StaffettaError as error:
            self._fail(request_id, error)
            return
        self._admit_when_complete(request_id, active)

    def _append(self, session: GatewaySession, part: decode_pb2.AppendPrompt) -> None:
        request_id = RequestId(part.request_id)
        active = self._active.get(request_id)
        if active is None or active.session is not session or active.prompt is None:
            return
        try:
            active.prompt.append(part.token_ids)
        except StaffettaError as error:
            self._fail(request_id, error)
            return
        self._admit_when_complete(request_id, active)

    def _admit_when_complete(self, request_id: RequestId, active: ActiveRequest) -> None:
        if active.prompt is None or not active.prompt.is_complete:
            return
        start = active.start
        request = Request(
            request_id=request_id,
            kind=RequestKind.GENERATE,
            prompt_token_ids=active.prompt.take(),
            sampling=sampling_from_proto(start.sampling, eos_token_ids=self._rank.eos_token_ids),
            arrival=next(self._arrivals),
            cache_salt=start.cache_salt,
            priority=start.priority,
            credit=start.credit,
            first_token_index=start.first_token_index,
            choices=active.choices,
        )
        active.prompt = None
        added = self._rank.engine_thread.call(lambda engine: engine.add(request))
        added.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._added, request_id, future))
        for choice_index in active.cancelled:
            self._cancel(request_id, choice_index)

    def _added(self, request_id: RequestId, added: "Future[None]") -> None:
        if (error := added.exception()) is not None:
            self._fail(request_id, error)

    def _grant(self, session: GatewaySession, grant: decode_pb2.Grant) -> None:
        request_id = RequestId(grant.request_id)
        if request_id in session.request_ids:
            choice_index, tokens = grant.choice_index, grant.tokens
            self._rank.engine_thread.submit(lambda engine: engine.grant(request_id, choice_index, tokens))

    def _cancel_for(self, session: GatewaySession, cancel: decode_pb2.CancelRequest) -> None:
        request_id = RequestId(cancel.request_id)
        if request_id in session.request_ids:
            self._cancel(request_id, cancel.choice_index if cancel.HasField("choice_index") else None)

    def _cancel(self, request_id: RequestId, choice_index: int | None = None) -> None:
        active = self._active.get(request_id)
        if active is None or active.prompt is None:
            self._rank.engine_thread.submit(lambda engine: engine.cancel(request_id, choice_index))
            return
        # The engine has not heard of it: parts of its prompt are still missing.
        if choice_index in active.choices:
            active.cancelled.add(choice_index)
        if choice_index is None or active.cancelled.issuperset(active.choices):
            self._end(active, FinishReason.CANCELLED)

    # From the engine to the gateway

    def on_output(self, output: StepOutput) -> None:
        """Takes one step's news. Engine thread."""
        self._loop.call_soon_threadsafe(self._dispatch, output)

    def on_first_tokens(self, request_id: RequestId, tokens: tuple[SampledToken, ...]) -> None:
        """Sends a prefill worker's first tokens at once. Endings, where one is, follow from the engine."""
        active = self._active.get(request_id)
        if active is not None:
            active.hand_over(tokens)

    def on_prompt_tokens(self, request_id: RequestId, tokens: tuple[PromptToken, ...]) -> None:
        """Sends the prompt's log-probabilities, as a prefill worker computed them, at once."""
        active = self._active.get(request_id)
        if active is not None:
            active.send_prompt(tokens)

    def _dispatch(self, output: StepOutput) -> None:
        news_of: dict[GatewaySession, News] = {}
        for part in output.outputs:
            active = self._active.get(part.request_id)
            if active is None:
                continue
            if (news := news_of.get(active.session)) is None:
                news = news_of[active.session] = News(active.session)
            if active.contradicts(part):
                log.error("request %s: recomputing gave another first token than the hand-off", part.request_id)
                self._cancel(part.request_id)
                error = HandoffFailedError("recomputing gave another token; send it again")
                active.end(FinishReason.ERROR, news, error=error)
            else:
                if part.prompt_tokens:
                    active.send_prompt(part.prompt_tokens)
                active.take(part, news)
            if active.is_over:
                self._forget(active)
        for news in news_of.values():
            news.send()

    # Endings

    def _fail(self, request_id: RequestId, error: BaseException) -> None:
        """Ends what has not ended of a request, if it is still here."""
        if (active := self._active.get(request_id)) is not None:
            self._end(active, FinishReason.ERROR, public_error(error))

    def _end(self, active: ActiveRequest, reason: FinishReason, error: StaffettaError | None = None) -> None:
        news = News(active.session)
        active.end(reason, news, error=error)
        news.send()
        self._forget(active)

    def _forget(self, active: ActiveRequest) -> None:
        request_id = RequestId(active.start.request_id)
        del self._active[request_id]
        active.session.request_ids.discard(request_id)
        self.source.drop_route(request_id)

    # For control and shutdown

    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    def num_choices(self) -> int:
        """Choices that have not ended."""
        return sum(len(active.open_choices) for active in self._active.values())

    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def begin_drain(self) -> None:
        """Refuses new requests from now on."""
        self._is_draining = True

    def cancel_all(self) -> int:
        """Cancels every request; returns how many there were."""
        request_ids = tuple(self._active)
        for request_id in request_ids:
            self._cancel(request_id)
        return len(request_ids)
