"""What a gateway is sent of one request: every token once, one ending for each choice, messages that fit."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from decode_svc import active
from decode_svc.active import ActiveRequest, GatewaySession, News
from decode_svc.handoff import HandoffRecord
from engine.request import FinishReason, PromptToken, RequestId, SampledToken, SequenceOutput, SequenceStats
from staffetta.errors import HandoffFailedError
from staffetta.rpc.options import MAX_MESSAGE_BYTES
from staffetta.v1 import common_pb2, decode_pb2
from worker import codec

REQUEST_ID = RequestId("ab" * 16)
CANCELLED, LENGTH = FinishReason.CANCELLED, FinishReason.LENGTH


@dataclass(slots=True, eq=False)
class FakePipe:
    """Keeps what a session sends."""

    sent: list[decode_pb2.DecodeSessionResponse] = field(default_factory=list)

    def send(self, message: decode_pb2.DecodeSessionResponse) -> None:
        self.sent.append(message)

    def events(self) -> list[decode_pb2.SequenceEvent]:
        return [event for message in self.sent for event in message.step.events]

    def positions(self) -> list[int]:
        return [token.index for event in self.events() for token in event.prompt_tokens]


def make_session() -> tuple[GatewaySession, FakePipe]:
    pipe = FakePipe()
    return GatewaySession("s", "g", cast(Any, pipe)), pipe


def make_active(*choices: int, first_token_index: int = 0) -> tuple[ActiveRequest, FakePipe]:
    session, pipe = make_session()
    start = decode_pb2.StartRequest(request_id=REQUEST_ID, first_token_index=first_token_index)
    return ActiveRequest(session, start, choices, HandoffRecord(), "decode-0", started_at=0.0), pipe


def tokens(*token_ids: int, first: int = 0) -> tuple[SampledToken, ...]:
    return tuple(SampledToken(index, token_id) for index, token_id in enumerate(token_ids, start=first))


def news(choice_index: int, *token_ids: int, first: int = 0, reason: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput(REQUEST_ID, choice_index, tokens=tokens(*token_ids, first=first), finish_reason=reason)


def told(pipe: FakePipe) -> list[tuple[int, list[tuple[int, int]], int]]:
    """What was sent since the last call, in short: each event's choice, its tokens, how it ended."""
    events = pipe.events()
    pipe.sent.clear()
    return [
        (event.choice_index, [(token.index, token.token_id) for token in event.tokens], event.finish_reason)
        for event in events
    ]


def take(request: ActiveRequest, *outputs: SequenceOutput) -> None:
    """Has a step's outputs sent."""
    step = News(request.session)
    for output in outputs:
        request.take(output, step)
    step.send()


def end(request: ActiveRequest, reason: FinishReason, error: HandoffFailedError | None = None) -> None:
    """Has the endings sent."""
    endings = News(request.session)
    request.end(reason, endings, error=error)
    endings.send()


def scored(*positions: int) -> tuple[PromptToken, ...]:
    return tuple(PromptToken(position, position + 100, -0.5, ((7, -0.25),)) for position in positions)


# Tokens


def test_first_tokens_go_to_their_choices_and_are_not_sent_again() -> None:
    request, pipe = make_active(0, 1, 2)
    request.hand_over((*tokens(5), *tokens(6), *tokens(7)))
    assert told(pipe) == [(0, [(0, 5)], 0), (1, [(0, 6)], 0), (2, [(0, 7)], 0)]
    take(request, news(1, 6))
    assert pipe.sent == []
    take(request, news(1, 6, 8), news(0, 9, first=1))
    assert told(pipe) == [(1, [(1, 8)], 0), (0, [(1, 9)], 0)]


def test_first_tokens_that_come_after_the_engines_own_are_dropped() -> None:
    request, pipe = make_active(0, 1)
    take(request, news(0, 5))
    request.hand_over((*tokens(5), *tokens(6)))
    assert told(pipe) == [(0, [(0, 5)], 0), (1, [(0, 6)], 0)]


def test_a_restarted_choice_goes_on_at_its_index() -> None:
    request, pipe = make_active(2, first_token_index=4)
    request.hand_over(tokens(9, first=4))
    take(request, news(2, 9, 1, first=4))
    assert told(pipe) == [(2, [(4, 9)], 0), (2, [(5, 1)], 0)]


def test_only_the_choice_that_drew_another_token_contradicts() -> None:
    request, _ = make_active(0, 1, 2)
    assert not request.contradicts(news(1, 3))  # nothing was sent that it could contradict
    request.hand_over((*tokens(5), *tokens(6), *tokens(7)))
    assert request.contradicts(news(1, 5))
    assert not request.contradicts(news(1, 6))
    assert not request.contradicts(news(1, 5, first=1))
    take(request, news(2, reason=LENGTH))
    assert not request.contradicts(news(2, 8))  # it is over: nobody hears of it


def test_a_token_crosses_with_all_that_was_asked_of_it() -> None:
    request, pipe = make_active(0)
    token = SampledToken(0, 5, -0.5, ((5, -0.5), (6, -1.5)))
    take(request, SequenceOutput(REQUEST_ID, 0, tokens=(token,)))
    ((told_token,),) = (event.tokens for event in pipe.events())
    alternatives = [
        common_pb2.TokenLogprob(token_id=5, logprob=-0.5),
        common_pb2.TokenLogprob(token_id=6, logprob=-1.5),
    ]
    assert told_token == common_pb2.Token(index=0, token_id=5, logprob=-0.5, top_logprobs=alternatives)


@pytest.mark.parametrize(("num_events", "sizes"), [(0, []), (1, [1]), (64, [64]), (65, [64, 1]), (129, [64, 64, 1])])
def test_news_are_sent_in_order_in_messages_below_the_bound(num_events: int, sizes: list[int]) -> None:
    session, pipe = make_session()
    step = News(session)
    for choice_index in range(num_events):
        step.add(REQUEST_ID, choice_index)
    step.send()
    assert [len(message.step.events) for message in pipe.sent] == sizes
    assert [(event.request_id, event.choice_index) for event in pipe.events()] == [
        (REQUEST_ID, choice_index) for choice_index in range(num_events)
    ]


# Endings


def test_each_choice_ends_once_and_without_the_others() -> None:
    request, pipe = make_active(0, 1, 2)
    assert list(request.open_choices) == [0, 1, 2]
    take(request, news(1, 4, reason=LENGTH))
    assert told(pipe) == [(1, [(0, 4)], common_pb2.FINISH_REASON_LENGTH)]
    assert list(request.open_choices) == [0, 2]
    take(request, news(1, 5, first=1), news(1, reason=CANCELLED))
    assert pipe.sent == []
    was_over = request.is_over
    end(request, CANCELLED)
    assert told(pipe) == [(0, [], common_pb2.FINISH_REASON_CANCELLED), (2, [], common_pb2.FINISH_REASON_CANCELLED)]
    assert (was_over, request.is_over) == (False, True)
    end(request, CANCELLED)
    assert pipe.sent == []


def test_a_choice_that_was_never_asked_for_is_not_told() -> None:
    request, pipe = make_active(0)
    take(request, news(1, 4, reason=LENGTH))
    assert pipe.sent == []
    assert list(request.open_choices) == [0]


def test_an_error_reaches_every_choice_that_has_not_ended() -> None:
    request, pipe = make_active(0, 1)
    end(request, FinishReason.ERROR, HandoffFailedError("told to fail"))
    assert [(event.choice_index, event.failure.reason, event.failure.message) for event in pipe.events()] == [
        (0, "HANDOFF_FAILED", "told to fail"),
        (1, "HANDOFF_FAILED", "told to fail"),
    ]


def test_every_choice_tells_alike_what_was_done_for_the_prompt() -> None:
    request, pipe = make_active(0, 1)
    request.record.prefill_worker, request.record.transport = "prefill-0", "tcp"
    request.record.num_bytes, request.record.num_blocks, request.record.num_failed = 4096, 4, 1
    request.record.prefill_cached_tokens, request.record.prefill_queue_s = 32, 0.25
    stats = SequenceStats(
        num_cached_tokens=16,
        num_local_prompt_tokens=3,
        num_recomputed_tokens=2,
        num_preemptions=1,
        queue_s=9.0,
        prefill_s=9.0,
    )
    take(request, *(SequenceOutput(REQUEST_ID, choice, finish_reason=LENGTH, stats=stats) for choice in (0, 1)))
    first, second = pipe.events()
    assert first.summary.handoff == second.summary.handoff
    assert first.summary.handoff == common_pb2.HandoffReport(
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        transport="tcp",
        handoff_bytes=4096,
        handoff_blocks=4,
        locally_prefilled_tokens=3,
        failed_handoffs=1,
        prefill_cached_tokens=32,
    )
    assert (first.summary.cached_tokens, first.summary.num_preemptions, first.summary.recomputed_tokens) == (16, 1, 2)
    assert first.summary.timings.queue_s == second.summary.timings.queue_s == 0.25


# Log-probabilities of the prompt


def test_a_prompt_that_is_scored_again_is_not_sent_again() -> None:
    request, pipe = make_active(0, 1)
    request.send_prompt(scored(1, 2, 3))
    request.send_prompt(scored(1, 2))
    request.send_prompt(scored(3, 4, 5))
    request.send_prompt(())
    request.send_prompt(scored(6))
    assert pipe.positions() == [1, 2, 3, 4, 5, 6]
    assert [event.choice_index for event in pipe.events()] == [0, 0, 0]
    assert pipe.events()[0].prompt_tokens[0] == common_pb2.Token(
        index=1, token_id=101, logprob=-0.5, top_logprobs=[common_pb2.TokenLogprob(token_id=7, logprob=-0.25)]
    )


def test_a_restarts_prompt_comes_with_its_choice() -> None:
    request, pipe = make_active(2, first_token_index=1)
    request.send_prompt(scored(1))
    assert [event.choice_index for event in pipe.events()] == [2]


@pytest.mark.parametrize(("num_tokens", "sizes"), [(511, [511]), (512, [512]), (513, [512, 1]), (1024, [512, 512])])
def test_a_long_prompt_is_sent_in_messages_below_the_bound(num_tokens: int, sizes: list[int]) -> None:
    request, pipe = make_active(0)
    alternatives = ((2**32 - 1, -1.5),) * 20
    request.send_prompt(tuple(PromptToken(p, 2**32 - 1, -1.5, alternatives) for p in range(1, num_tokens + 1)))
    assert [len(event.prompt_tokens) for event in pipe.events()] == sizes
    assert all(len(message.step.events) == 1 for message in pipe.sent)
    assert max(message.ByteSize() for message in pipe.sent) < MAX_MESSAGE_BYTES
    assert pipe.positions() == list(range(1, num_tokens + 1))


def test_the_bound_would_be_crossed_by_twice_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PROMPT_TOKENS_PER_MESSAGE", 1024)
    request, pipe = make_active(0)
    request.send_prompt(tuple(PromptToken(p, 2**32 - 1, -1.5, ((2**32 - 1, -1.5),) * 20) for p in range(1, 1025)))
    assert pipe.sent[0].ByteSize() > MAX_MESSAGE_BYTES


def test_a_message_of_endings_with_all_alternatives_fits_the_bound() -> None:
    alternatives = ((2**32 - 1, -1.5),) * 20
    request, pipe = make_active(*range(64))
    request.record.prefill_worker = "p" * 64
    last = (SampledToken(0, 2**32 - 1, -1.5, alternatives),)
    error = HandoffFailedError("why" * 200)
    outputs = [
        SequenceOutput(REQUEST_ID, choice, last, finish_reason=FinishReason.ERROR, error=error) for choice in range(64)
    ]
    take(request, *outputs)
    (message,) = pipe.sent
    assert len(message.step.events) == active.EVENTS_PER_MESSAGE == 64
    assert message.ByteSize() < MAX_MESSAGE_BYTES
