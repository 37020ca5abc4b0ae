"""Completions over our own gRPC door, `InferenceService.Generate`.

Messages are kept with their times and read when the phase is over.
"""

import time
from collections.abc import Sequence

import grpc.aio

from bench.record import Record
from bench.target import TargetError
from staffetta.rpc.channel import open_channel
from staffetta.v1 import inference_pb2, inference_pb2_grpc

_OPEN_TIMEOUT_S = 10.0


class GrpcTarget:
    """See `bench.target.Target`. One channel for all requests."""

    def __init__(self, name: str, address: str) -> None:
        self._name = name
        self._channel = open_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    @property
    def name(self) -> str:
        """What tables call it."""
        return self._name

    async def open(self) -> None:
        """Connects, by asking which model is served."""
        try:
            await self._stub.GetModel(inference_pb2.GetModelRequest(), timeout=_OPEN_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise TargetError(f"{self._name} cannot be asked for its model: {error.details()}") from error

    async def complete(self, prompt: Sequence[int], output_tokens: int, *, due_s: float) -> "GrpcAnswer":
        """Streams one completion to its end."""
        request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(token_ids=prompt))
        request.sampling.temperature = 0.0
        request.sampling.max_tokens = output_tokens
        request.sampling.ignore_eos = True
        try:
            messages = [(time.perf_counter(), message) async for message in self._stub.Generate(request)]
        except grpc.aio.AioRpcError as error:
            raise TargetError(f"{self._name} refused or broke off: {error.details()}") from error
        return GrpcAnswer(self._name, messages, due_s=due_s, output_tokens=output_tokens)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()


class GrpcAnswer:
    """One streamed completion: its messages and when each came."""

    def __init__(
        self,
        name: str,
        messages: Sequence[tuple[float, inference_pb2.GenerateResponse]],
        *,
        due_s: float,
        output_tokens: int,
    ) -> None:
        self._name = name
        self._messages = messages
        self._due_s = due_s
        self._output_tokens = output_tokens

    def record(self) -> Record:
        """What came when: every message with tokens is an arrival."""
        arrivals = [moment for moment, message in self._messages if message.delta.tokens]
        counted = sum(len(message.delta.tokens) for _, message in self._messages)
        if counted != self._output_tokens:
            raise TargetError(f"{self._name} sent {counted} tokens, asked for {self._output_tokens}")
        return Record(self._due_s, tuple(arrivals), self._output_tokens)
