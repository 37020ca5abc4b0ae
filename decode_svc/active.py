"""What a decode worker knows of one gateway's stream and of each request on it, up to the request's last event.

Event loop only; times are monotonic. It never talks to the engine: the servicer tells it what came of a request.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from decode_svc.handoff import HandoffRecord
from engine.request import FinishReason, PromptToken, RequestId, SampledToken, SequenceOutput
from staffetta.errors import StaffettaError
from staffetta.rpc.session import SessionPipe
from staffetta.rpc.status import failure_of
from staffetta.v1 import common_pb2, decode_pb2
from worker.admission import PromptParts
from worker.codec import fill_token, finish_reason_to_proto, prompt_token_parts

EVENTS_PER_MESSAGE = 64
"""64 events with 20 alternatives for each token stay below the message bound.

A prompt's log-probabilities have messages of their own.
"""

Pipe = SessionPipe[decode_pb2.DecodeSessionRequest, decode_pb2.DecodeSessionResponse]


@dataclass(slots=True, eq=False)
class GatewaySession:
    """One gateway's stream."""

    session_id: str
    gateway_id: str
    pipe: Pipe
    request_ids: set[RequestId] = field(default_factory=set)

    def send_prompt(self, request_id: RequestId, choice_index: int, tokens: Sequence[PromptToken]) -> None:
        """Queues log-probabilities of a prompt in messages below the bound, in order."""
        for part in prompt_token_parts(tokens):
            news = News(self)
            news.add(request_id, choice_index).prompt_tokens.extend(part)
            news.send()


class News:
    """Events for one gateway, made in the messages that will carry them, below the bound and in order.

    An event that is made elsewhere is copied into a message, and with it all its tokens, which takes longer than the
    rest of what is done for a step.
    """

    __slots__ = ("_messages", "_session")

    def __init__(self, session: GatewaySession) -> None:
        self._session = session
        self._messages: list[decode_pb2.DecodeSessionResponse] = []

    def add(self, request_id: str, choice_index: int) -> decode_pb2.SequenceEvent:
        """A further event of a choice, for the caller to fill before the news are sent."""
        if not self._messages or len(self._messages[-1].step.events) == EVENTS_PER_MESSAGE:
            self._messages.append(decode_pb2.DecodeSessionResponse())
        event = self._messages[-1].step.events.add()
        event.request_id = request_id
        event.choice_index = choice_index
        return event

    def send(self) -> None:
        """Queues the messages, which may be none."""
        messages, self._messages = self._messages, []
        for message in messages:
            self._session.pipe.send(message)


@dataclass(slots=True, eq=False)
class _Choice:
    """What of a choice that has not ended was sent."""

    next_index: int
    """The output position of the next token to send. The engine draws those before it again when it gave up the
    hand-off that brought them."""
    handed_over: SampledToken | None = None
    """The first token, when a hand-off brought it."""


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One request until each of its choices has ended. Times are monotonic."""

    session: GatewaySession
    start: decode_pb2.StartRequest
    choices: tuple[int, ...]
    record: HandoffRecord
    """What its hand-offs did so far."""
    decode_worker: str
    started_at: float
    prompt: PromptParts | None = None
    """None once the engine has it."""
    cancelled: set[int] = field(default_factory=set)
    """Choices that were cancelled before the engine had the prompt."""
    first_token_at: float | None = None
    _next_position: int = 1
    """The prompt's next token whose log-probability is to be sent."""
    _open: dict[int, _Choice] = field(init=False)
    """The choices that have not ended."""

    def __post_init__(self) -> None:
        self._open = {choice_index: _Choice(self.start.first_token_index) for choice_index in self.choices}

    @property
    def open_choices(self) -> tuple[int, ...]:
        """The choices that have not ended."""
        return tuple(self._open)

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def send_prompt(self, tokens: tuple[PromptToken, ...]) -> None:
        """Sends those of the prompt's tokens that are news: whoever computes the prompt again scores it again."""
        unsent = [token for token in tokens if token.position >= self._next_position]
        self._next_position += len(unsent)
        self.session.send_prompt(RequestId(self.start.request_id), self.open_choices[0], unsent)

    def hand_over(self, tokens: tuple[SampledToken, ...]) -> None:
        """Sends first tokens that a hand-off brought, one for each choice."""
        news = News(self.session)
        for choice_index, token in zip(self.choices, tokens, strict=True):
            choice = self._open.get(choice_index)
            if choice is not None and (unsent := self._unsent(choice, (token,))):
                choice.handed_over = token
                self._add(news, choice_index, unsent)
        news.send()

    def contradicts(self, output: SequenceOutput) -> bool:
        """Whether the engine drew another token where one was sent already: what follows would not fit the client's."""
        choice = self._open.get(output.choice_index)
        sent = None if choice is None else choice.handed_over
        return sent is not None and any(t.index == sent.index and t.token_id != sent.token_id for t in output.tokens)

    def take(self, output: SequenceOutput, news: News) -> None:
        """Adds to `news` what a step brought of one choice, which may be its last; nothing where that is none."""
        choice = self._open.get(output.choice_index)
        if choice is None:
            return
        tokens = self._unsent(choice, output.tokens)
        if output.finish_reason is not None:
            del self._open[output.choice_index]
            self._add_ending(news, output, tokens)
        elif tokens:
            self._add(news, output.choice_index, tokens)

    def end(self, reason: FinishReason, news: News, *, error: StaffettaError | None = None) -> None:
        """Adds to `news` the endings of all choices that have none."""
        request_id = RequestId(self.start.request_id)
        outputs = [SequenceOutput(request_id, index, finish_reason=reason, error=error) for index in self._open]
        self._open.clear()
        for output in outputs:
            self._add_ending(news, output, [])

    def _unsent(self, choice: _Choice, tokens: tuple[SampledToken, ...]) -> list[SampledToken]:
        """Those of `tokens` that are news, and are none from now on. Notes the time of the request's first."""
        unsent = [token for token in tokens if token.index >= choice.next_index]
        choice.next_index += len(unsent)
        if unsent and self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return unsent

    def _add(self, news: News, choice_index: int, tokens: list[SampledToken]) -> decode_pb2.SequenceEvent:
        event = news.add(self.start.request_id, choice_index)
        for token in tokens:
            fill_token(event.tokens.add(), token)
        return event

    def _add_ending(self, news: News, output: SequenceOutput, tokens: list[SampledToken]) -> None:
        """Adds a choice's last event: its last tokens, how it ended, and what it took."""
        record = self.record
        event = self._add(news, output.choice_index, tokens)
        event.finish_reason = finish_reason_to_proto(output.finish_reason)
        event.summary.handoff.CopyFrom(
            common_pb2.HandoffReport(
                prefill_worker=record.prefill_worker,
                decode_worker=self.decode_worker,
                transport=record.transport,
                handoff_bytes=record.num_bytes,
                handoff_blocks=record.num_blocks,
                failed_handoffs=record.num_failed,
                prefill_cached_tokens=record.prefill_cached_tokens,
            )
        )
        if output.error is not None:
            event.failure.CopyFrom(failure_of(output.error))
        if (stats := output.stats) is not None:
            event.summary.cached_tokens = stats.num_cached_tokens
            event.summary.num_preemptions = stats.num_preemptions
            event.summary.recomputed_tokens = stats.num_recomputed_tokens
            event.summary.handoff.locally_prefilled_tokens = stats.num_local_prompt_tokens
        queue_s = record.prefill_queue_s or (stats.queue_s if stats is not None else 0.0)
        event.summary.timings.CopyFrom(self._timings(queue_s=queue_s, landed_at=record.landed_at))

    def _timings(self, *, queue_s: float, landed_at: float | None) -> common_pb2.PhaseTimings:
        """Splits the time since the request started into phases that add up to it."""
        now = time.monotonic()
        first_token_at = now if self.first_token_at is None else self.first_token_at
        to_first_s = first_token_at - self.started_at
        queue_s = min(queue_s, to_first_s)
        transfer_s = 0.0 if landed_at is None else min(max(0.0, landed_at - first_token_at), now - first_token_at)
        return common_pb2.PhaseTimings(
            queue_s=queue_s,
            prefill_s=to_first_s - queue_s,
            transfer_s=transfer_s,
            decode_s=now - first_token_at - transfer_s,
        )
