"""The decode worker's session: what a gateway may say, and what one request's mistake costs others."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from decode_svc import active
from decode_svc.servicer import DecodeServicer
from engine.request import FinishReason, RequestId, SampledToken, SequenceOutput, StepOutput
from staffetta.errors import Code, IncompatiblePeerError, ProtocolError, StaffettaError
from staffetta.rpc.channel import open_channel
from staffetta.rpc.status import error_from_rpc
from staffetta.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from tests.handoff.cluster import RunningWorker, client_of, decode_worker, make_prompt, prefill_worker, until_idle
from tests.rpc.in_loop import in_loop, until

ALONE = {"local_prefill": "auto"}


def make_open(decode: RunningWorker, **fields: object) -> decode_pb2.DecodeSessionRequest:
    opening = {
        "protocol_version": 1,
        "gateway_id": "g",
        "heartbeat_s": 1.0,
        "model_digest": decode.host.rank.identity.model_digest,
    }
    return decode_pb2.DecodeSessionRequest(
        sequence_number=1,
        open=decode_pb2.OpenDecodeSession(**opening | fields),  # type: ignore[arg-type]
    )


async def refusal(decode: RunningWorker, *messages: decode_pb2.DecodeSessionRequest) -> StaffettaError:
    """How a session that begins with `messages` is ended by the worker."""
    async with open_channel(decode.address) as channel:
        call = decode_pb2_grpc.DecodeServiceStub(channel).Session()
        for message in messages:
            await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            while await call.read() is not grpc.aio.EOF:
                pass
    return error_from_rpc(raised.value)


@in_loop
async def test_a_session_of_another_model_is_refused_with_both_digests() -> None:
    async with decode_worker(**ALONE) as decode:
        error = await refusal(decode, make_open(decode, model_digest="theirs"))
        ours = decode.host.rank.identity.model_digest
    assert isinstance(error, IncompatiblePeerError)
    assert error.message == f"model_digest is theirs at the gateway and {ours} here; give both the same model"


@in_loop
async def test_a_session_of_a_distant_protocol_is_refused_with_both_versions() -> None:
    async with decode_worker(**ALONE) as decode:
        error = await refusal(decode, make_open(decode, protocol_version=3))
    assert isinstance(error, IncompatiblePeerError)
    assert error.message == "protocol_version is 3 at the peer and 1 here; they may differ by 1"


@in_loop
async def test_a_session_opens_with_the_workers_numerics_and_its_bounds() -> None:
    async with decode_worker(**ALONE, max_requests=7) as decode, open_channel(decode.address) as channel:
        call = decode_pb2_grpc.DecodeServiceStub(channel).Session()
        await call.write(make_open(decode))
        answer = await call.read()
        assert isinstance(answer, decode_pb2.DecodeSessionResponse)
        assert answer.opened.identity == decode.host.rank.identity
        assert answer.opened.identity.numerics_digest == decode.host.rank.runner.numerics_digest != ""
        assert answer.opened.max_requests == 7
        call.cancel()


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (None, "the first message of a session must open it"),
        (decode_pb2.DecodeSessionRequest(sequence_number=2), "command None has no place in an open session"),
        (
            decode_pb2.DecodeSessionRequest(sequence_number=2, open=decode_pb2.OpenDecodeSession()),
            "command open has no place in an open session",
        ),
        (
            decode_pb2.DecodeSessionRequest(sequence_number=4, heartbeat=common_pb2.Heartbeat()),
            "message 4 came where 2 was due; the session ends",
        ),
    ],
)
def test_a_message_out_of_place_ends_the_session(second: decode_pb2.DecodeSessionRequest | None, told: str) -> None:
    @in_loop
    async def run() -> None:
        async with decode_worker(**ALONE) as decode:
            first = decode_pb2.DecodeSessionRequest(sequence_number=1, heartbeat=common_pb2.Heartbeat())
            messages = [first] if second is None else [make_open(decode), second]
            error = await refusal(decode, *messages)
            await until(lambda: decode.service.num_sessions() == 0)
        assert isinstance(error, ProtocolError)
        assert error.message == told

    run()


@in_loop
async def test_a_gateway_that_is_silent_is_let_go() -> None:
    async with decode_worker(**ALONE, heartbeat_s=0.05) as decode:
        error = await refusal(decode, make_open(decode))
        assert error.reason == "WORKER_LOST"
        await until(lambda: decode.service.num_sessions() == 0)


BAD_STARTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "id": ({"request_id": "not hexadecimal"}, "request_id", "INVALID_REQUEST"),
    "empty": ({"num_prompt_tokens": 0, "token_ids": []}, "prompt", "INVALID_REQUEST"),
    "vocabulary": ({"token_ids": [10**6], "num_prompt_tokens": 1}, "token_ids", "INVALID_REQUEST"),
    "too many": ({"num_prompt_tokens": 3}, "token_ids", "INVALID_REQUEST"),
    "length": ({"num_prompt_tokens": 10**6}, "prompt", "CONTEXT_LENGTH_EXCEEDED"),
    "unresolved": ({"sampling": common_pb2.SamplingParams(max_tokens=3)}, "temperature", "INVALID_REQUEST"),
}


@in_loop
async def test_a_request_that_cannot_be_served_fails_alone() -> None:
    async with decode_worker(**ALONE) as decode, client_of(decode) as client:
        good = client.start(make_prompt(20), max_tokens=30)
        for change, _, reason in BAD_STARTS.values():
            fields: dict[str, Any] = {"token_ids": make_prompt(10), "num_prompt_tokens": 10} | change
            answer = client.start((), **fields)
            await answer.ended()
            assert answer.failure.reason == reason
            assert answer.failure.code == Code.INVALID_ARGUMENT
            assert answer.last is not None
            assert answer.last.finish_reason == common_pb2.FINISH_REASON_ERROR
        await good.ended()
        assert len(good.tokens) == 30
        await until_idle(decode)


@in_loop
async def test_parts_beyond_the_announced_prompt_fail_the_request() -> None:
    async with decode_worker(**ALONE) as decode, client_of(decode) as client:
        answer = client.start(make_prompt(5), num_prompt_tokens=8)
        client.send(append_prompt=decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=[1] * 4))
        await answer.ended()
        assert answer.failure.message == "the prompt has 1 more tokens than num_prompt_tokens says"
        client.send(append_prompt=decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=[1]))
        await client.ask(make_prompt(3))
        await until_idle(decode)


@in_loop
async def test_requests_of_other_sessions_are_out_of_reach() -> None:
    async with decode_worker(**ALONE) as decode, client_of(decode) as client, client_of(decode) as other:
        answer = client.start(make_prompt(5), num_prompt_tokens=8)
        other.send(append_prompt=decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=[1, 1, 1]))
        other.send(cancel=decode_pb2.CancelRequest(request_id=answer.request_id))
        other.send(grant=decode_pb2.Grant(request_id=answer.request_id, tokens=5))
        await other.ask(make_prompt(3))  # the session lives, and has worked the three off
        assert answer.last is None
        rest = make_prompt(8)[5:]
        client.send(append_prompt=decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=rest))
        await answer.ended()
        assert (await other.ask(make_prompt(8))).token_ids == answer.token_ids


@in_loop
async def test_a_request_started_twice_ends_the_session_that_did() -> None:
    async with decode_worker(**ALONE) as decode, client_of(decode) as client:
        answer = client.start(make_prompt(5), max_tokens=900)
        await answer.until(lambda answer: bool(answer.tokens))
        start = decode_pb2.StartRequest(request_id=answer.request_id)
        error = await refusal(
            decode, make_open(decode), decode_pb2.DecodeSessionRequest(sequence_number=2, start=start)
        )
        assert error.message == f"request {answer.request_id} was started twice"
        client.cancel(answer)
        await answer.ended()


@in_loop
async def test_the_reason_of_an_end_reaches_the_peer_though_a_message_is_under_way() -> None:
    async with decode_worker(**ALONE) as decode:
        for _ in range(40):  # the opening's answer is being written when the second message is refused
            error = await refusal(decode, make_open(decode), decode_pb2.DecodeSessionRequest(sequence_number=2))
            assert isinstance(error, ProtocolError)


@in_loop
async def test_credit_pauses_a_stream_and_a_grant_lets_it_go_on() -> None:
    async with decode_worker(**ALONE) as decode, client_of(decode) as client:
        answer = client.start(make_prompt(10), max_tokens=8, credit=3)
        other = await client.ask(make_prompt(10), max_tokens=8)
        assert len(answer.tokens) == 3
        client.send(grant=decode_pb2.Grant(request_id=answer.request_id, tokens=100))
        await answer.ended()
        assert answer.token_ids == other.token_ids
        client.send(grant=decode_pb2.Grant(request_id=answer.request_id, tokens=100))  # late: nothing happens
        await until_idle(decode)


@in_loop
async def test_a_full_worker_refuses_and_a_draining_one_too() -> None:
    async with decode_worker(**ALONE, max_requests=2) as decode, client_of(decode) as client:
        held = [client.start(make_prompt(5), max_tokens=900) for _ in range(2)]
        refused = await client.ask(make_prompt(5))
        assert (refused.failure.reason, refused.failure.is_retryable) == ("QUEUE_FULL", True)
        decode.service.begin_drain()
        drained = await client.ask(make_prompt(5))
        assert (drained.failure.reason, drained.failure.is_retryable) == ("DRAINING", True)
        assert decode.service.cancel_all() == 2
        for answer in held:
            await answer.ended()
            assert answer.last is not None
            assert answer.last.finish_reason == common_pb2.FINISH_REASON_CANCELLED
        await until_idle(decode)


@in_loop
async def test_the_phases_of_a_request_add_up_to_its_time() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill) as decode,
        client_of(decode) as client,
    ):
        started = asyncio.get_running_loop().time()
        answer = await client.ask(make_prompt(90), max_tokens=20)
        elapsed = asyncio.get_running_loop().time() - started
    assert answer.last is not None
    timings = answer.last.summary.timings
    phases = (timings.queue_s, timings.prefill_s, timings.transfer_s, timings.decode_s)
    assert min(phases) >= 0.0
    assert timings.prefill_s > 0.0
    assert 0.0 < sum(phases) <= elapsed


@in_loop
async def test_an_ending_tells_what_preemption_cost() -> None:
    async with decode_worker(**ALONE, num_blocks=8) as decode, client_of(decode) as client:
        answers = [client.start(make_prompt(40, seed=seed), max_tokens=60) for seed in range(2)]
        for answer in answers:
            await answer.ended()
    summaries = [answer.last.summary for answer in answers if answer.last is not None]
    assert sorted(summary.num_preemptions > 0 for summary in summaries) == [False, True]
    assert [summary.recomputed_tokens > 0 for summary in summaries] == [
        summary.num_preemptions > 0 for summary in summaries
    ]


@in_loop
async def test_many_events_of_one_step_are_split_over_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "EVENTS_PER_MESSAGE", 2)
    async with decode_worker(**ALONE) as decode, client_of(decode) as client:
        answers = [client.start(make_prompt(5, seed=seed)) for seed in range(5)]
        for answer in answers:
            await answer.ended()
        assert [len(answer.tokens) for answer in answers] == [6] * 5


@in_loop
async def test_a_token_that_a_hand_off_brought_is_not_sent_again() -> None:
    """The engine draws it again when it gave the hand-off up before it heard of the token."""
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.hold()
        answer = client.start(make_prompt(40), max_tokens=5)
        await answer.until(lambda answer: len(answer.tokens) == 1)
        decode_servicer: DecodeServicer = decode.service._servicer  # type: ignore[attr-defined]
        first = SampledToken(0, answer.token_ids[0])
        request_id = RequestId(answer.request_id)
        decode_servicer.on_output(StepOutput(1, (SequenceOutput(request_id, tokens=(first,)),)))
        decode_servicer.on_output(StepOutput(2, (SequenceOutput(request_id, tokens=(SampledToken(1, 9),)),)))
        await answer.until(lambda answer: len(answer.tokens) == 2)
        ended = SequenceOutput(request_id, tokens=(first, SampledToken(2, 8)), finish_reason=FinishReason.STOP)
        decode_servicer.on_output(StepOutput(3, (ended,)))
        await answer.ended()
        assert [token.index for token in answer.tokens] == [0, 1, 2]
        decode.host.rank.engine_thread.submit(lambda engine: engine.cancel(request_id))
        prefill.faults.release()
        await until_idle(prefill, decode)
