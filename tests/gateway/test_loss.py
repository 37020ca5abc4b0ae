"""Workers that come, go, refuse and fall silent, and what requests on them see."""

import asyncio
from typing import Any

import pytest

from staffetta.errors import DrainingError, QueueFullError, WorkerLostError
from staffetta.rpc.status import failure_of
from staffetta.v1 import common_pb2
from tests.gateway.running import Running, asynchronous, eventually, ids_of, running

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def send(it: Running, **body: Any) -> "asyncio.Task[Any]":
    return asyncio.create_task(it.http.post(CHAT, json={"messages": HI, "seed": 1} | body))


@asynchronous
async def test_a_worker_lost_before_the_first_token_is_replaced_unseen() -> None:
    async with running(reply=None) as it:
        task = send(it)
        first = await it.worker.starts.get()
        other = await it.add_worker("decode-1", reply=ids_of("a"))
        await it.worker.stop()
        response = await task
        second = await other.starts.get()
    assert response.status_code == 200
    assert response.json()["staffetta"]["handoff"]["decode_worker"] == "decode-1"
    assert second.sampling == first.sampling
    assert second.request_id != first.request_id


@asynchronous
async def test_a_worker_lost_after_the_first_token_is_a_retryable_error() -> None:
    async with running(reply=None) as it:
        task = send(it)
        start = await it.worker.starts.get()
        it.worker.emit(start.request_id, ids_of("a"))
        await eventually(lambda: it.gateway.journeys.in_flight().num_running == 1)
        other = await it.add_worker("decode-1", reply=ids_of("b"))
        await it.worker.stop()
        response = await task
        assert other.starts.empty()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")


@pytest.mark.parametrize("error", [QueueFullError("full"), DrainingError("draining"), WorkerLostError("lost")])
@asynchronous
async def test_a_worker_that_refuses_is_passed_over(error: Exception) -> None:
    async with running() as it:
        it.worker.failure = failure_of(error)
        await it.add_worker("decode-1", reply=ids_of("a"))
        responses = [await send(it) for _ in range(3)]
    assert [response.status_code for response in responses] == [200] * 3
    assert {response.json()["staffetta"]["handoff"]["decode_worker"] for response in responses} == {"decode-1"}


@asynchronous
async def test_a_failure_of_the_request_itself_is_not_tried_elsewhere() -> None:
    async with running() as it:
        it.worker.failure = common_pb2.Failure(code=13, reason="STEP_FAILED", message="the step failed")
        response = await send(it)
        other = await it.add_worker("decode-1", reply=ids_of("a"))
        assert other.starts.empty()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "step_failed")


@asynchronous
async def test_a_request_waits_for_a_worker_to_register() -> None:
    async with running(reply=ids_of("a"), has_worker=False) as it:
        task = send(it)
        await eventually(lambda: it.gateway.journeys.in_flight().num_waiting == 1)
        await it.worker.start(it.grpc_address)
        assert (await task).status_code == 200


@asynchronous
async def test_a_request_that_a_drain_gave_up_unstarted_goes_elsewhere() -> None:
    async with running(reply=None) as it:
        task = send(it)
        start = await it.worker.starts.get()
        it.worker.is_draining = True
        await it.add_worker("decode-1", reply=ids_of("a"))
        it.worker.emit(start.request_id, (), finish=common_pb2.FINISH_REASON_CANCELLED)
        assert (await task).json()["staffetta"]["handoff"]["decode_worker"] == "decode-1"


@asynchronous
async def test_a_draining_worker_takes_nothing_new() -> None:
    async with running(reply=ids_of("a")) as it:
        it.worker.is_draining = True
        await it.add_worker("decode-1", reply=ids_of("b"))
        await eventually(lambda: any(w.load.is_draining for w in it.gateway.workers))
        responses = [await send(it) for _ in range(3)]
    assert {response.json()["choices"][0]["message"]["content"] for response in responses} == {"b"}


@asynchronous
async def test_equal_workers_take_turns() -> None:
    async with running(reply=ids_of("a")) as it:
        await it.add_worker("decode-1", reply=ids_of("b"))
        texts = [(await send(it)).json()["choices"][0]["message"]["content"] for _ in range(4)]
    assert sorted(texts) == ["a", "a", "b", "b"]


@asynchronous
async def test_a_restarted_worker_of_the_same_name_is_found_again() -> None:
    async with running(reply=ids_of("a")) as it:
        assert (await send(it)).status_code == 200
        await it.worker.stop()
        await eventually(lambda: not list(it.gateway.workers))
        again = type(it.worker)(it.worker.digest, reply=ids_of("b"))
        again.incarnation = "2"
        it.others.append(again)
        await again.start(it.grpc_address)
        assert (await send(it)).json()["choices"][0]["message"]["content"] == "b"


@asynchronous
async def test_a_request_that_waited_gets_what_the_context_of_the_worker_that_came_leaves() -> None:
    async with running(reply=ids_of("a"), has_worker=False) as it:
        task = send(it)
        await eventually(lambda: it.gateway.journeys.in_flight().num_waiting == 1)
        it.worker.max_model_len = 100
        await it.worker.start(it.grpc_address)
        response = await task
        start = await it.worker.starts.get()
    assert response.status_code == 200
    assert start.sampling.max_tokens == 100 - start.num_prompt_tokens


@asynchronous
async def test_a_request_that_waited_for_a_worker_it_cannot_fit_is_refused_at_once() -> None:
    async with running(has_worker=False, start_timeout_s=60.0) as it:
        task = send(it, max_tokens=200)
        await eventually(lambda: it.gateway.journeys.in_flight().num_waiting == 1)
        it.worker.max_model_len = 100
        await it.worker.start(it.grpc_address)
        response = await task
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 100 tokens" in response.json()["error"]["message"]


@asynchronous
async def test_a_request_that_moves_gets_what_the_context_of_the_next_worker_leaves() -> None:
    async with running(reply=None) as it:
        task = send(it)
        first = await it.worker.starts.get()
        other = await it.add_worker("decode-1", reply=ids_of("a"), max_model_len=100)
        await it.worker.stop()
        assert (await task).status_code == 200
        second = await other.starts.get()
    assert first.sampling.max_tokens == 2048 - first.num_prompt_tokens
    assert second.sampling.max_tokens == 100 - second.num_prompt_tokens
