"""A client that leaves, at any phase and through either door, takes everything with it: no task, no request, no
block."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from gateway.generate_http import REQUEST_ID_KEY, GenerateEndpoint
from gateway.openai_request import parse_completion
from gateway.openai_response import CompletionShape
from gateway.request import new_request_id
from staffetta.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.gateway.running import Running, asynchronous, eventually, ids_of, running

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


async def leave_http(it: Running, body: dict[str, Any]) -> "asyncio.Task[Any]":
    """A request whose cancellation closes the client's connection."""
    return asyncio.create_task(it.http.post(CHAT, json={"messages": HI} | body))


async def drop(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("is_stream", [False, True])
@asynchronous
async def test_a_rest_client_that_leaves_before_the_first_token_cancels_the_request(is_stream: bool) -> None:
    async with running(reply=None) as it:
        task = await leave_http(it, {"stream": is_stream})
        start = await it.worker.starts.get()
        await drop(task)
        assert await it.worker.cancels.get() == start.request_id
        await eventually(lambda: it.num_in_flight() == 0)


@pytest.mark.parametrize("is_stream", [False, True])
@asynchronous
async def test_a_rest_client_that_leaves_while_tokens_flow_cancels_the_request(is_stream: bool) -> None:
    async with running(reply=None) as it:
        task = await leave_http(it, {"stream": is_stream})
        start = await it.worker.starts.get()
        it.worker.emit(start.request_id, ids_of("a"))
        await eventually(lambda: it.gateway.journeys.in_flight().num_running == 1)
        await drop(task)
        assert await it.worker.cancels.get() == start.request_id
        await eventually(lambda: it.num_in_flight() == 0)


@asynchronous
async def test_a_client_that_leaves_while_no_worker_is_there_leaves_nothing() -> None:
    async with running(has_worker=False) as it:
        task = await leave_http(it, {})
        await eventually(lambda: it.gateway.journeys.in_flight().num_waiting == 1)
        await drop(task)
        await eventually(lambda: it.num_in_flight() == 0)


@asynchronous
async def test_a_client_that_leaves_during_tokenization_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    is_begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(*_: object) -> None:
        is_begun.set()
        await may_end.wait()

    monkeypatch.setattr("gateway.journey.Journeys._prepare", slow)
    async with running(reply=None) as it:
        task = await leave_http(it, {})
        await is_begun.wait()
        await drop(task)
        await eventually(lambda: it.num_in_flight() == 0)
        assert it.worker.starts.empty()


@pytest.mark.parametrize("num_tokens", [0, 1])
@asynchronous
async def test_a_cancelled_call_cancels_the_request(num_tokens: int) -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
        events = aiter(call)
        assert (await anext(events)).WhichOneof("event") == "started"
        start = await it.worker.starts.get()
        if num_tokens:
            it.worker.emit(start.request_id, ids_of("a"))
            assert (await anext(events)).delta.text == "a"
        call.cancel()
        assert await it.worker.cancels.get() == start.request_id
        await eventually(lambda: it.num_in_flight() == 0)


@asynchronous
async def test_a_finished_request_is_not_cancelled() -> None:
    async with running(reply=ids_of("a")) as it:
        assert (await it.http.post(CHAT, json={"messages": HI})).status_code == 200
        assert it.num_in_flight() == 0
        assert it.worker.cancels.empty()


@asynchronous
async def test_a_client_that_does_not_read_exhausts_its_own_credit_only() -> None:
    async with running(reply=ids_of("a") * 40, credit_tokens=8) as it:
        may_read = asyncio.Event()
        inputs = [{"type": "http.request", "body": b'{"prompt": "x", "max_tokens": 40, "stream": true}'}]
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if inputs:
                return inputs.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            await may_read.wait()
            sent.append(message.get("body", b""))

        endpoint = GenerateEndpoint(it.gateway.journeys, parse_completion, CompletionShape, max_body_bytes=1000)
        scope = {"type": "http", "headers": [], REQUEST_ID_KEY: new_request_id()}
        slow = asyncio.create_task(endpoint(scope, receive, send))
        request_id = (await it.worker.starts.get()).request_id
        quick = await it.http.post(CHAT, json={"messages": HI, "max_tokens": 20})
        assert quick.json()["usage"]["completion_tokens"] == 20
        assert it.worker.credit[request_id, 0] == 8
        assert sent == []
        may_read.set()
        await slow
    assert b"".join(sent).count(b'"text":"a"') == 40


@asynchronous
async def test_credit_is_granted_only_as_the_client_takes() -> None:
    async with running(reply=None, credit_tokens=4) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
        events = aiter(call)
        await anext(events)
        request_id = (await it.worker.starts.get()).request_id
        letter = ids_of("a")
        it.worker.emit(request_id, letter)
        await anext(events)
        assert it.worker.credit[request_id, 0] == 4
        it.worker.emit(request_id, letter, at=1)
        await anext(events)
        await eventually(lambda: it.worker.credit[request_id, 0] == 6)
        it.worker.emit(request_id, (), finish=common_pb2.FINISH_REASON_STOP)
        assert [event.WhichOneof("event") async for event in events] == ["finished"]


@asynchronous
async def test_a_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    async with running(reply=None) as it:
        task = await leave_http(it, {})
        start = await it.worker.starts.get()
        drain = asyncio.create_task(it.gateway.drain(timeout_s=5))
        await eventually(lambda: it.gateway.journeys.reason_not_ready() is not None)
        refused = await it.http.post(CHAT, json={"messages": HI})
        ready = await it.http.get("/ready")
        assert not drain.done()
        it.worker.emit(start.request_id, ids_of("a"), finish=common_pb2.FINISH_REASON_STOP)
        assert (await task).status_code == 200
        await drain
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert ready.json()["reason"] == "the gateway is draining"
