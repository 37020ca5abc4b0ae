"""The gateway's end of the session to one decode worker: every request of this gateway on that worker, over one stream.

Reads without ever stopping: a slow client exhausts its own request's credit and nobody else's. When the stream ends,
however it ends, every request on it ends with WorkerLostError. Event loop only.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import grpc.aio

from staffetta import validate
from staffetta.errors import IncompatiblePeerError, InternalError, ProtocolError, StaffettaError, WorkerLostError
from staffetta.rpc.channel import open_channel
from staffetta.rpc.session import PROTOCOL_VERSION, SessionPipe, prompt_parts
from staffetta.rpc.status import error_from_failure, error_of_call
from staffetta.v1 import common_pb2, decode_pb2, decode_pb2_grpc, registry_pb2

STALLED_HEARTBEATS = 5
"""Heartbeats of an engine that stands still after which other workers are preferred."""
LOST_HEARTBEATS = 30
"""And after which its requests are not left hanging any longer."""
EVENTS_AT_ONCE: Final = 32
"""Of one step: what is written for them leaves before those after them are looked at."""

log = logging.getLogger(__name__)

Pipe = SessionPipe[decode_pb2.DecodeSessionResponse, decode_pb2.DecodeSessionRequest]


class RequestStream:
    """One request's events on one session, those of all its choices. Whoever started it closes it."""

    def __init__(self, session: "DecodeSession", request_id: str, *, num_choices: int) -> None:
        self._session = session
        self._request_id = request_id
        self._events: deque[decode_pb2.SequenceEvent | StaffettaError] = deque()
        self._arrival: asyncio.Future[None] | None = None
        """What the one reader waits for, or last waited for."""
        self._take: Callable[[decode_pb2.SequenceEvent], bool] | None = None
        self.num_running = num_choices
        """Choices that the worker has not ended."""

    @property
    def worker_id(self) -> str:
        """The decode worker that runs the request."""
        return self._session.worker_id

    @property
    def numerics_digest(self) -> str:
        """What names that worker's arithmetic."""
        return self._session.numerics_digest

    def is_stalled(self) -> bool:
        """Whether that worker's engine stands still."""
        return self._session.is_stalled

    async def next(self) -> decode_pb2.SequenceEvent:
        """The next event. Raises what ended the request: WorkerLostError, or the failure that the worker reported."""
        # While there is anything, no task switch; and however much comes in one step, one wake.
        while not self._events:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        event = self._events.popleft()
        if isinstance(event, StaffettaError):
            raise event
        if event.finish_reason == common_pb2.FINISH_REASON_ERROR:
            raise error_from_failure(event.failure)
        return event

    def take_at_once(self, take: Callable[[decode_pb2.SequenceEvent], bool]) -> None:
        """From now on an event that ends nothing, and that the reader waits for, is offered to `take` as it comes;
        where that returns True, it is done with, and the reader waits on."""
        self._take = take

    def grant(self, choice_index: int, num_tokens: int) -> None:
        """Lets the worker produce `num_tokens` more of a choice."""
        if self.num_running:
            grant = decode_pb2.Grant(request_id=self._request_id, choice_index=choice_index, tokens=num_tokens)
            self._session.send(decode_pb2.DecodeSessionRequest(grant=grant))

    def cancel(self, choice_index: int | None = None) -> None:
        """Asks the worker to end one choice, or every one; their last events still come. Idempotent."""
        if self.num_running:
            cancel = decode_pb2.CancelRequest(request_id=self._request_id, choice_index=choice_index)
            self._session.send(decode_pb2.DecodeSessionRequest(cancel=cancel))

    def close(self) -> None:
        """Ends the request here and, unless it has ended there, on the worker. Idempotent."""
        self.cancel()
        self.num_running = 0
        self._session.forget(self._request_id)

    def put(self, event: decode_pb2.SequenceEvent | StaffettaError) -> None:
        """Delivers an event or what ended the request; for the session alone."""
        if isinstance(event, StaffettaError):
            self.num_running = 0
        elif event.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self.num_running = max(0, self.num_running - 1)
        elif self._take is not None and not self._events and self._arrival is not None and not self._arrival.done():
            # The reader has taken everything and waits.
            try:
                if self._take(event):
                    return
            except Exception:
                # One request's failure must not become the session's.
                log.exception("%s: an event could not be taken", self._request_id)
                event = InternalError("the request failed here; send it again")
        self._events.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class DecodeSession:
    """A session to one decode worker, made and served by `run_session`. Its limits are known once it is open."""

    def __init__(self, pipe: Pipe, worker_id: str, *, numerics_digest: str = "") -> None:
        self._pipe = pipe
        self._streams: dict[str, RequestStream] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._last_turns = 0
        self._num_stalled = 0
        self.worker_id = worker_id
        self.numerics_digest = numerics_digest
        self.max_model_len = 0
        self.max_requests = 0

    @property
    def num_in_flight(self) -> int:
        """Requests of this gateway on the worker."""
        return len(self._streams)

    @property
    def num_choices(self) -> int:
        """Choices of those requests that the worker has not ended; what its own bound counts."""
        return sum(stream.num_running for stream in self._streams.values())

    @property
    def is_stalled(self) -> bool:
        """Whether the worker's engine has stood still over several heartbeats."""
        return self._num_stalled >= STALLED_HEARTBEATS

    async def wait_idle(self) -> None:
        """Returns when no request is on the session."""
        await self._is_idle.wait()

    def start(self, request: decode_pb2.StartRequest, token_ids: Sequence[int]) -> RequestStream:
        """Starts `request`, whose `token_ids` are filled in here, in parts when they are many. The caller closes the
        stream."""
        request.num_prompt_tokens = len(token_ids)
        first, *rest = prompt_parts(token_ids)
        request.token_ids.extend(first)
        num_choices = validate.num_choices(validate.sampling_of(request.sampling))
        stream = RequestStream(self, request.request_id, num_choices=num_choices)
        self._streams[request.request_id] = stream
        self._is_idle.clear()
        self.send(decode_pb2.DecodeSessionRequest(start=request))
        for part in rest:
            append = decode_pb2.AppendPrompt(request_id=request.request_id, token_ids=part)
            self.send(decode_pb2.DecodeSessionRequest(append_prompt=append))
        return stream

    def send(self, command: decode_pb2.DecodeSessionRequest) -> None:
        """Queues a command; never waits."""
        self._pipe.send(command)

    def forget(self, request_id: str) -> None:
        """Drops what still comes for a request."""
        if self._streams.pop(request_id, None) is not None and not self._streams:
            self._is_idle.set()

    def accept(self, answer: decode_pb2.DecodeSessionResponse | None, announced: common_pb2.WorkerIdentity) -> None:
        """Takes the worker's answer to the opening. Raises when it is none, or not from who announced itself."""
        if answer is None or answer.WhichOneof("message") != "opened":
            raise ProtocolError(f"worker {self.worker_id} did not answer the opening of a session")
        opened = answer.opened
        for name in ("worker_id", "incarnation", "model_digest", "numerics_digest"):
            said, found = getattr(announced, name), getattr(opened.identity, name)
            if said != found:
                raise IncompatiblePeerError(f"the worker announced {name} {said!r} and opened with {found!r}")
        self._pipe.expect_heartbeats(opened.heartbeat_s)
        self.max_model_len, self.max_requests = opened.max_model_len, opened.max_requests

    def heartbeat(self) -> decode_pb2.DecodeSessionRequest:
        """A sign of life."""
        return decode_pb2.DecodeSessionRequest(heartbeat=common_pb2.Heartbeat(num_requests=self.num_in_flight))

    async def read(self) -> None:
        """Delivers events until the worker ends the stream.

        Raises what `SessionPipe.receive` raises, and WorkerLostError when the engine stands still for too long.
        """
        while (message := await self._pipe.receive()) is not None:
            kind = message.WhichOneof("message")
            if kind == "step":
                await self._deliver(message.step.events)
            elif kind == "heartbeat":
                self._watch(message.heartbeat)
            else:
                raise ProtocolError(f"the worker sent {kind or 'an empty message'} on an open session")

    async def _deliver(self, events: Iterable[decode_pb2.SequenceEvent]) -> None:
        """Delivers a step's events, letting the event loop write what is there before all of it is."""
        for number, event in enumerate(events):
            if number % EVENTS_AT_ONCE == 0 and number > 0:
                await asyncio.sleep(0)
            if (stream := self._streams.get(event.request_id)) is not None:
                stream.put(event)

    def lose(self, error: StaffettaError) -> None:
        """Ends every request with `error`."""
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        self._is_idle.set()

    def _watch(self, heartbeat: common_pb2.Heartbeat) -> None:
        has_turned = heartbeat.engine_turns != self._last_turns
        self._last_turns = heartbeat.engine_turns
        self._num_stalled = 0 if has_turned else self._num_stalled + 1
        if self._num_stalled >= LOST_HEARTBEATS:
            raise WorkerLostError(f"the worker's engine stood still for {self._num_stalled} heartbeats")


async def run_session(
    worker: registry_pb2.WorkerAnnouncement,
    *,
    gateway_id: str,
    heartbeat_s: float,
    on_open: Callable[[DecodeSession], None],
) -> None:
    """Opens a session to `worker`, hands it to `on_open`, and serves it to its end; then its requests are lost.

    Returns when the worker ended the stream. Raises StaffettaError when it cannot be reached, refuses, falls silent,
    breaks the order, or is not who it announced itself to be.
    """
    channel = open_channel(worker.address)
    call = decode_pb2_grpc.DecodeServiceStub(channel).Session()
    pipe = Pipe(call.read, call.write, heartbeat_s=heartbeat_s)
    session = DecodeSession(pipe, worker.identity.worker_id, numerics_digest=worker.identity.numerics_digest)

    async def serve() -> None:
        pipe.send(_opening(worker.identity, gateway_id, heartbeat_s))
        session.accept(await pipe.receive(), worker.identity)
        on_open(session)
        await session.read()

    try:
        await pipe.run(serve(), make_heartbeat=session.heartbeat)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        # A write that meets a finished call says so in general terms; the call's status has the reason.
        raise await error_of_call(call) or WorkerLostError("the worker closed the session") from None
    finally:
        session.lose(WorkerLostError(f"decode worker {session.worker_id} is gone; send the request again"))
        call.cancel()
        await channel.close()


def _opening(worker: common_pb2.WorkerIdentity, gateway_id: str, heartbeat_s: float) -> decode_pb2.DecodeSessionRequest:
    opening = decode_pb2.OpenDecodeSession(
        protocol_version=PROTOCOL_VERSION,
        gateway_id=gateway_id,
        model_digest=worker.model_digest,
        heartbeat_s=heartbeat_s,
    )
    return decode_pb2.DecodeSessionRequest(open=opening)
