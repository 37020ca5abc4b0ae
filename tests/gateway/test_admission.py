"""Everything a client can make the gateway do is bounded, in number and in time, and a drain waits for it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway.admission import Admission
from staffetta.errors import DrainingError, QueueFullError
from staffetta.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.running import Running, asynchronous, demo_model, eventually, ids_of, running

PLAIN = "/v1/completions"
BODY = b'{"prompt": "x"}'


@asynccontextmanager
async def connected(it: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection to the REST door."""
    host, _, port = it.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


def head(num_bytes: int) -> bytes:
    return f"POST {PLAIN} HTTP/1.1\r\nhost: x\r\ncontent-length: {num_bytes}\r\n\r\n".encode()


@asynccontextmanager
async def calling(it: Running) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(it.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@asynchronous
async def test_what_ends_makes_room_however_it_ends() -> None:
    admission = Admission(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.held():
            with pytest.raises(QueueFullError, match="holds 1 requests"), admission.held():
                pass
            raise ZeroDivisionError


@asynchronous
async def test_a_drain_admits_nothing_and_waits_for_what_is_held() -> None:
    admission = Admission(2)
    with admission.held():
        drain = asyncio.create_task(admission.drain(timeout_s=60))
        await eventually(lambda: admission.is_draining)
        with pytest.raises(DrainingError), admission.held():
            pass
        assert not drain.done()
    await drain


@asynchronous
async def test_a_drain_in_vain_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    admission = Admission(2)
    with admission.held():
        await admission.drain(timeout_s=0.01)
    assert caplog.messages == ["1 requests had not ended after 0.01 s"]


@pytest.mark.parametrize("method", ["Tokenize", "Detokenize"])
@asynchronous
async def test_calls_to_the_tokenizer_count_as_requests(method: str) -> None:
    request = getattr(inference_pb2, f"{method}Request")()
    async with running(max_requests=1) as it, calling(it) as stub:
        with it.gateway.journeys.admission.held(), pytest.raises(grpc.aio.AioRpcError) as full:
            await getattr(stub, method)(request if method == "Detokenize" else inference_pb2.TokenizeRequest(text="x"))
    assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the gateway holds 1 requests, of 1 that it may" in (full.value.details() or "")


@asynchronous
async def test_the_tokenizers_answer_is_bounded_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.servicer.MAX_CLIENT_MESSAGE_BYTES", 64)
    async with running() as it, calling(it) as stub:
        calls = [
            stub.Tokenize(inference_pb2.TokenizeRequest(text="xyzzy " * 100)),
            stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids_of("hello " * 100))),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match=r"the answer would have \d+ bytes, the limit is 64") as long:
                await call
            assert long.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@asynchronous
async def test_token_ids_of_more_than_four_contexts_are_not_turned_into_text() -> None:
    most = 4 * demo_model().limits.max_model_len
    async with running() as it, calling(it) as stub:
        token_ids = ids_of("a")[:1] * most
        assert (await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=token_ids))).text == "a" * most
        with pytest.raises(grpc.aio.AioRpcError, match=f"has {most + 1} entries, the limit is {most}"):
            await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[*token_ids, token_ids[0]]))


@asynchronous
async def test_a_body_that_does_not_arrive_is_given_up_and_holds_its_place_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.generate_http.BODY_TIMEOUT_S", 0.5)
    async with running(reply=ids_of("a"), max_requests=1) as it, connected(it) as (reader, writer):
        writer.write(head(100) + BODY)
        answer = asyncio.create_task(reader.read())
        while (meanwhile := await it.http.post(PLAIN, content=BODY)).status_code == 200:
            pass
        assert meanwhile.status_code == 429
        status, _, rest = (await answer).partition(b"\r\n")
        assert status == b"HTTP/1.1 408 Request Timeout"
        assert b"\r\nconnection: close\r\n" in rest
        assert b'"the body was not whole after 0.5 s; send it faster"' in rest
        assert b'"type": "timeout_error", "param": null, "code": "request_timeout"' in rest
        assert (await it.http.post(PLAIN, content=BODY)).status_code == 200


@asynchronous
async def test_a_client_that_leaves_during_its_upload_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running(reply=ids_of("a"), max_requests=1) as it:
        async with connected(it) as (_, writer):
            writer.write(head(100) + BODY)
            while (await it.http.post(PLAIN, content=BODY)).status_code == 200:
                pass
        await eventually(lambda: any("left before its body was whole" in message for message in caplog.messages))
        assert (await it.http.post(PLAIN, content=BODY)).status_code == 200
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@asynchronous
async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.app._SLACK", 1)
    async with running(max_requests=1, has_worker=False) as it:
        async with connected(it), connected(it), connected(it):
            assert (await it.http.get("/health")).status_code == 503
        while (await it.http.get("/health")).status_code == 503:
            pass


@asynchronous
async def test_calls_are_bounded_and_refusals_do_not_move_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.app._SLACK", 0)
    request = inference_pb2.GetModelRequest()
    async with running(reply=None, max_requests=1) as it, calling(it) as stub:
        for _ in range(3):
            generation = stub.Generate(inference_pb2.GenerateRequest(text="x"))  # the other call is the registration
            await it.worker.starts.get()
            for _ in range(5):
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await stub.GetModel(request)
                assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            generation.cancel()
            await it.worker.cancels.get()
            await until_served(stub)


async def until_served(stub: Any) -> None:
    while True:
        try:
            await stub.GetModel(inference_pb2.GetModelRequest())
        except grpc.aio.AioRpcError:
            continue
        return


@pytest.mark.parametrize(("host", "num_warnings"), [("127.0.0.1", 0), ("0.0.0.0", 2)])  # noqa: S104 - what is warned of
@asynchronous
async def test_doors_that_are_open_to_the_network_are_warned_of(
    host: str, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(has_worker=False, http=f"{host}:0", grpc=f"{host}:0") as it:
        doors = (("REST", it.http_address), ("gRPC", it.grpc_address))
    assert (
        caplog.messages
        == [
            f"the {door} door on {address} is open to the network in plaintext, without authentication"
            for door, address in doors
        ][:num_warnings]
    )
