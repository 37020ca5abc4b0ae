"""The choices of a request on their way: stop strings, credit, errors, losses and bounds, each choice on its own."""

import asyncio

import grpc.aio
import pytest

from staffetta.errors import QueueFullError, StepFailedError
from staffetta.rpc.status import failure_of
from staffetta.v1 import common_pb2, decode_pb2
from tests.gateway.running import asynchronous, eventually, generate, ids_of, play, running
from tests.gateway.test_rest import CHAT, HI, PLAIN

A, B, C = (ids_of(letter)[0] for letter in "abc")
LENGTH, STOP = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP


@asynchronous
async def test_a_stop_string_ends_its_choice_only_and_what_still_comes_of_it_is_dropped() -> None:
    async with running() as it:
        play(it.worker, "one two three", "four two", "four five")
        body = {"messages": HI, "n": 3, "stop": "two", "return_token_ids": True}
        answer = (await it.http.post(CHAT, json=body)).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one ", "four ", "four five"]
    assert [choice["stop_reason"] for choice in answer["choices"]] == ["two", "two", None]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
    assert answer["choices"][0]["token_ids"] == ids_of("one two")
    assert answer["usage"]["completion_tokens"] == sum(
        len(ids_of(text)) for text in ("one two", "four two", "four five")
    )


@asynchronous
async def test_a_choice_is_cancelled_as_soon_as_a_stop_string_has_ended_it_and_the_others_go_on() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        events = aiter(generate(channel, n=3, stop=["b"]))
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [A, B])
        assert (await anext(events)).delta.text == "a"
        cut = (await anext(events)).finished
        assert (cut.choice_index, cut.finish_reason, cut.stop_string) == (0, STOP, "b")
        assert await it.worker.cancelled_choices.get() == 0
        assert list(it.worker.credit) == [(request_id, 1), (request_id, 2)]
        it.worker.emit(request_id, [C], choice=1, finish=LENGTH)
        assert (await anext(events)).delta.text == "c"
        assert (await anext(events)).finished.choice_index == 1
        it.worker.emit(request_id, [B], choice=2)
        (last,) = [event.finished async for event in events if event.WhichOneof("event") == "finished"]
        assert await it.worker.cancelled_choices.get() == 2
        assert it.num_in_flight() == 0
        assert it.worker.cancels.empty() and it.worker.cancelled_choices.empty()
    assert (last.choice_index, last.finish_reason, last.stop_string) == (2, STOP, "b")
    assert [end.handoff.handoff_bytes for end in (cut, last)] == [4096, 4096]
    assert [end.usage.completion_tokens for end in (cut, last)] == [2, 1]


@asynchronous
async def test_a_worker_that_is_about_to_end_takes_no_choice_back_that_a_stop_string_had_ended() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        it.worker.obeys_cancels = False
        events = aiter(generate(channel, n=2, stop=["b"]))
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [B])
        await anext(events)
        it.worker.emit(request_id, (), finish=common_pb2.FINISH_REASON_CANCELLED)
        assert (await anext(events)).finished.finish_reason == STOP
        it.worker.emit(request_id, [A], choice=1)
        await anext(events)
        it.worker.emit(request_id, (), choice=1, finish=common_pb2.FINISH_REASON_CANCELLED)
        with pytest.raises(grpc.aio.AioRpcError, match="the worker gave the request up"):
            await anext(events)


@asynchronous
async def test_a_cut_choice_that_the_worker_ends_too_is_told_at_once_and_once() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        it.worker.obeys_cancels = False
        events = aiter(generate(channel, n=2, stop=["b"]))
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [B])
        assert [token.token_id for token in (await anext(events)).delta.tokens] == [B]
        it.worker.emit(request_id, [A], at=1)
        it.worker.emit(request_id, [A], at=2, finish=LENGTH)
        cut = (await anext(events)).finished
        it.worker.emit(request_id, [A], choice=1, finish=LENGTH)
        rest = [event async for event in events]
        assert it.worker.cancelled_choices.qsize() == 1
    assert (cut.choice_index, cut.finish_reason, cut.usage.completion_tokens) == (0, STOP, 1)
    assert [event.WhichOneof("event") for event in rest] == ["delta", "finished"]
    assert rest[1].finished.finish_reason == LENGTH


@asynchronous
async def test_credit_is_granted_choice_by_choice_and_never_to_one_that_a_stop_string_ended() -> None:
    async with running(reply=None, credit_tokens=4) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        it.worker.obeys_cancels = False
        events = aiter(generate(channel, n=2, stop=["b"]))
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [A, A, A], choice=1)
        await anext(events)
        await_next = asyncio.create_task(anext(events))
        await eventually(lambda: it.worker.credit[request_id, 1] == 7)
        assert it.worker.credit[request_id, 0] == 4
        it.worker.emit(request_id, [A, A, B])
        await await_next
        it.worker.emit(request_id, [A], choice=1, at=3)
        await anext(events)
        it.worker.emit(request_id, [A], choice=1, at=4)
        await anext(events)
        it.worker.emit(request_id, [A], choice=1, at=5, finish=LENGTH)
        await anext(events)
        assert (it.worker.credit[request_id, 0], it.worker.credit[request_id, 1]) == (4, 9)
        ends = [event async for event in events]
    assert [end.finished.choice_index for end in ends] == [1, 0]


@asynchronous
async def test_an_error_of_one_choice_ends_the_request_and_cancels_the_others() -> None:
    async with running(reply=None) as it:
        answer = asyncio.create_task(it.http.post(CHAT, json={"messages": HI, "n": 2}))
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [A])
        failed = decode_pb2.SequenceEvent(
            request_id=request_id,
            choice_index=1,
            finish_reason=common_pb2.FINISH_REASON_ERROR,
            failure=failure_of(StepFailedError("the step failed")),
        )
        it.worker.send(failed)
        response = await answer
        assert await it.worker.cancels.get() == request_id
        assert it.num_in_flight() == 0
    assert (response.status_code, response.json()["error"]["code"]) == (500, "step_failed")


@pytest.mark.parametrize("choice", [1, 2])
@asynchronous
async def test_news_of_a_choice_that_has_ended_or_was_not_asked_for_ends_the_request(
    choice: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gateway.servicer")
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        events = aiter(generate(channel, n=2))
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [A], choice=1, finish=LENGTH)
        assert [(await anext(events)).WhichOneof("event") for _ in range(2)] == ["delta", "finished"]
        it.worker.emit(request_id, [A], choice=choice, at=1)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await anext(events)
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    told = f"news came of choice {choice}, which has ended or was not asked for"
    assert [message.endswith(told) for message in caplog.messages] == [True]


@asynchronous
async def test_a_worker_lost_before_any_choice_has_a_token_is_replaced_unseen() -> None:
    async with running(reply=None) as it:
        answer = asyncio.create_task(it.http.post(PLAIN, json={"prompt": "x", "n": 2}))
        first = await it.worker.starts.get()
        other = await it.add_worker("decode-1")
        play(other, "a", "b")
        await it.worker.stop()
        response = await answer
        second = await other.starts.get()
    assert [choice["text"] for choice in response.json()["choices"]] == ["a", "b"]
    assert second.sampling == first.sampling


@asynchronous
async def test_a_worker_lost_after_a_token_of_any_choice_ends_all() -> None:
    async with running(reply=None) as it:
        answer = asyncio.create_task(it.http.post(PLAIN, json={"prompt": "x", "n": 2}))
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [A], choice=1)
        await eventually(lambda: it.gateway.journeys.in_flight().num_running == 1)
        await it.add_worker("decode-1", reply=[A])
        await it.worker.stop()
        response = await answer
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")


@asynchronous
async def test_the_gateway_counts_choices_against_what_it_may_hold() -> None:
    async with running(reply=None, max_requests=4) as it:
        first = asyncio.create_task(it.http.post(PLAIN, json={"prompt": "x", "n": 3}))
        request_id = (await it.worker.starts.get()).request_id
        full = await it.http.post(PLAIN, json={"prompt": "x", "n": 2})
        for choice in range(3):
            it.worker.emit(request_id, [A], choice=choice, finish=LENGTH)
        await first
        it.worker.reply = [A]
        fits = await it.http.post(PLAIN, json={"prompt": "x", "n": 4})
    assert full.status_code == 429
    assert full.json()["error"]["message"].startswith("the gateway holds 3 requests, of 4 that it may")
    assert [choice["text"] for choice in fits.json()["choices"]] == ["a"] * 4


@asynchronous
async def test_choices_that_the_worker_has_not_ended_count_against_its_bound() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        session = next(worker.session for worker in it.gateway.workers)
        assert session is not None
        session.max_requests = 4
        events = aiter(generate(channel, n=3))
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        full = await it.http.post(PLAIN, json={"prompt": "x", "n": 2})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        it.worker.emit(request_id, [A], choice=2, finish=LENGTH)
        await eventually(lambda: session.num_choices == 2)
        assert session.heartbeat().heartbeat.num_requests == 1
        it.worker.reply = [A]
        assert (await it.http.post(PLAIN, json={"prompt": "x", "n": 2})).status_code == 200


@asynchronous
async def test_more_choices_than_any_worker_or_the_gateway_holds_are_refused_for_good() -> None:
    async with running(reply=[A], max_requests=6) as it:
        session = next(worker.session for worker in it.gateway.workers)
        assert session is not None
        session.max_requests = 4
        refused = [await it.http.post(PLAIN, json={"prompt": "x", "n": n}) for n in (5, 7)]
        fits = await it.http.post(PLAIN, json={"prompt": "x", "n": 4})
    assert [response.status_code for response in (*refused, fits)] == [400, 400, 200]
    errors = [response.json()["error"] for response in refused]
    assert [error["param"] for error in errors] == ["n", "n"]
    assert [error["message"] for error in errors] == [
        "n is 5 and the workers hold at most 4 choices each; lower it",
        "n is 7 and this gateway holds at most 6 choices; lower it",
    ]


@asynchronous
async def test_metrics_count_the_request_and_its_hand_off_once_and_every_choices_tokens() -> None:
    async with running() as it:
        play(it.worker, "ab", "abc", "a")
        await it.http.post(CHAT, json={"messages": HI, "n": 3})
        page = (await it.http.get("/metrics")).text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="demo"} 1.0' in page
    assert 'vllm:time_to_first_token_seconds_count{model_name="demo"} 1.0' in page
    num_tokens = sum(len(ids_of(text)) for text in ("ab", "abc", "a"))
    assert f'vllm:generation_tokens_total{{model_name="demo"}} {num_tokens}.0' in page
    assert f'vllm:inter_token_latency_seconds_count{{model_name="demo"}} {num_tokens - 3}.0' in page
    assert 'staffetta_handoff_bytes_count{transport="shm"} 1.0' in page
    assert 'staffetta_recomputed_tokens_total{reason="preemption"} 18.0' in page


@asynchronous
async def test_a_full_worker_refuses_all_choices_and_another_takes_them() -> None:
    async with running() as it:
        it.worker.failure = failure_of(QueueFullError("full"))
        other = await it.add_worker("decode-1")
        play(other, "a", "b")
        responses = [await it.http.post(PLAIN, json={"prompt": "x", "n": 2}) for _ in range(2)]
    assert [[choice["text"] for choice in response.json()["choices"]] for response in responses] == [["a", "b"]] * 2


@asynchronous
async def test_a_client_that_leaves_takes_every_choice_with_it() -> None:
    async with running(reply=None) as it:
        answer = asyncio.create_task(it.http.post(CHAT, json={"messages": HI, "n": 3, "stream": True}))
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, [A], choice=2, finish=LENGTH)
        await eventually(lambda: it.gateway.journeys.in_flight().num_running == 1)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        assert await it.worker.cancels.get() == request_id
        await eventually(lambda: it.num_in_flight() == 0)
