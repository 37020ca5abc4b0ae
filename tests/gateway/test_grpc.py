"""The gRPC door, by a client that knows nothing but what reflection tells it."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from gateway import prepare
from staffetta.v1 import common_pb2
from tests.gateway.running import Running, asynchronous, demo_model, ids_of, running

SERVICE = "staffetta.v1.InferenceService"


class Reflected:
    """A client of one service, built from the server's own description."""

    def __init__(self, channel: grpc.aio.Channel, pool: descriptor_pool.DescriptorPool) -> None:
        self._channel = channel
        self._methods = pool.FindServiceByName(SERVICE).methods_by_name

    def call(self, name: str, request: dict[str, Any], **options: Any) -> Any:
        """Starts a call; a stream for Generate, an awaitable else."""
        method = self._methods[name]
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        start = make(
            f"/{SERVICE}/{name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        return start(request_class(**request), **options)


async def reflect(it: Running, channel: grpc.aio.Channel) -> Reflected:
    """Fetches every file that the service's description needs."""
    pool = descriptor_pool.DescriptorPool()
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]

    async def ask(**query: str) -> list[descriptor_pb2.FileDescriptorProto]:
        request = reflection_pb2.ServerReflectionRequest(**query)  # type: ignore[arg-type]
        call = stub.ServerReflectionInfo(iter([request]))  # type: ignore[operator]
        return [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            async for answer in call
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]

    async def add(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
        for file in files:
            for name in file.dependency:
                await add(await ask(file_by_filename=name))
            pool.Add(file)

    await add(await ask(file_containing_symbol=SERVICE))
    return Reflected(channel, pool)


def reason_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


@asynchronous
async def test_a_reflected_client_generates() -> None:
    reply = ids_of("Hello")
    async with running(reply=reply) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        client = await reflect(it, channel)
        request = {
            "chat": {"messages": [{"role": "user", "content": "hi"}]},
            "sampling": {"seed": 3, "logprobs": 0},
            "request_id": "mine",
        }
        events = [event async for event in client.call("Generate", request)]
    assert [event.WhichOneof("event") for event in events] == ["started", *["delta"] * len(reply), "finished"]
    started, finished = events[0].started, events[-1].finished
    assert (started.request_id, started.model, started.seed) == ("mine", "demo", 3)
    assert len(started.id) == 32
    assert "".join(event.delta.text for event in events[1:-1]) == "Hello"
    tokens = [token for event in events[1:-1] for token in event.delta.tokens]
    assert [(token.index, token.token_id, token.logprob) for token in tokens] == [
        (index, token_id, -0.5) for index, token_id in enumerate(reply)
    ]
    assert finished.finish_reason == common_pb2.FINISH_REASON_STOP
    assert finished.usage.completion_tokens == len(reply)
    assert finished.usage.prompt_tokens == started.prompt_tokens
    assert finished.handoff.transport == "shm"
    assert not finished.HasField("stop_string")
    assert finished.timings.gateway_s > 0


@asynchronous
async def test_tokenize_and_detokenize_are_what_generate_does() -> None:
    async with running(reply=ids_of("a")) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        client = await reflect(it, channel)
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        tokenized = await client.call("Tokenize", {"chat": chat})
        async for _ in client.call("Generate", {"chat": chat}):
            pass
        start = await it.worker.starts.get()
        text = await client.call("Detokenize", {"token_ids": ids_of("naïve")})
        model = await client.call("GetModel", {"model": "demo"})
    assert list(tokenized.token_ids) == list(start.token_ids)
    assert text.text == "naïve"
    assert (model.model, model.vocab_size, model.max_model_len) == ("demo", 1024, 2048)
    assert (list(model.eos_token_ids), model.num_parameters, model.numerics_digest) == ([2], 1234, "numerics")
    assert model.model_digest == demo_model().digest


@asynchronous
async def test_text_and_tokens_are_turned_into_each_other_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def spy(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*args)

        return run

    monkeypatch.setattr("gateway.journey.tokenize", spy(prepare.tokenize))
    monkeypatch.setattr("gateway.journey.detokenize", spy(prepare.detokenize))
    async with running() as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        client = await reflect(it, channel)
        await client.call("Tokenize", {"text": "hi"})
        await client.call("Detokenize", {"token_ids": ids_of("hi")})
    assert len(threads) == 2
    assert threading.main_thread() not in threads


@asynchronous
async def test_refusals_are_rich_statuses_with_reason_and_param() -> None:
    refusals: list[tuple[str, dict[str, Any], grpc.StatusCode, str, str]] = [
        ("Generate", {}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "prompt"),
        ("Generate", {"text": "x", "model": "y"}, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", "model"),
        (
            "Generate",
            {"text": "x", "sampling": {"temperature": float("nan")}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            "temperature",
        ),
        (
            "Generate",
            {"text": "x", "request_id": "\n"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            "request_id",
        ),
        ("Generate", {"chat": {}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "messages"),
        (
            "Generate",
            {"tokens": {"token_ids": [7] * 2048}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "CONTEXT_LENGTH_EXCEEDED",
            "prompt",
        ),
        ("Tokenize", {}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "input"),
        ("Detokenize", {"token_ids": [5000]}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "token_ids"),
        ("GetModel", {"model": "y"}, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", "model"),
    ]
    async with running() as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        client = await reflect(it, channel)
        for name, request, code, reason, param in refusals:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                call = client.call(name, request)
                await (anext(aiter(call)) if name == "Generate" else call)
            assert refusal.value.code() == code, request
            info = reason_of(refusal.value)
            assert (info.reason, info.metadata["param"], info.metadata["retryable"]) == (reason, param, "false")


@asynchronous
async def test_a_deadline_that_passes_is_answered_with_the_phase() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        client = await reflect(it, channel)
        with pytest.raises(grpc.aio.AioRpcError) as silent:
            async for _ in client.call("Generate", {"text": "x"}, timeout=0.4):
                pass
        first = await it.worker.starts.get()
        assert await it.worker.cancels.get() == first.request_id
        generating = client.call("Generate", {"text": "x"}, timeout=0.6)
        it.worker.emit((await it.worker.starts.get()).request_id, ids_of("a"))
        with pytest.raises(grpc.aio.AioRpcError) as slow:
            async for _ in generating:
                pass
        assert it.num_in_flight() == 0
    async with running(has_worker=False) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        client = await reflect(it, channel)
        with pytest.raises(grpc.aio.AioRpcError) as alone:
            async for _ in client.call("Generate", {"text": "x"}, timeout=0.4):
                pass
    phases = [silent.value, slow.value, alone.value]
    assert {error.code() for error in phases} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert [(error.details() or "").partition(";")[0] for error in phases] == [
        "the deadline passed while waiting for the first token",
        "the deadline passed while generating",
        "the deadline passed while waiting for a worker",
    ]


@asynchronous
async def test_health_follows_readiness() -> None:
    async with running(has_worker=False) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return int(answer.status)

        services = ("", SERVICE, "staffetta.v1.RegistryService")
        assert {await status(name) for name in services} == {health_pb2.HealthCheckResponse.NOT_SERVING}
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        states = aiter(watch)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await it.worker.start(it.grpc_address)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.sleep(0)
        await it.worker.stop()
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
