"""A client of a running gateway's gRPC door, for `ask`, `chat` and serve's own first requests."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import grpc.aio

from cli.relay import Answer
from staffetta.config.schema import ClientConfig
from staffetta.errors import Code, NotFoundError, UnavailableError
from staffetta.exits import ExitCode, ModelNotFoundError, OperatorError, PortError
from staffetta.rpc.channel import open_channel
from staffetta.rpc.status import error_from_rpc
from staffetta.v1 import common_pb2, inference_pb2, inference_pb2_grpc


class Client:
    """One channel to a gateway; use as an async context manager. Event loop only."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = open_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float, on_text: Callable[[str], None]
    ) -> Answer:
        """Runs one generation; `on_text` gets each piece of text as it arrives. Raises OperatorError.

        Cancelling the caller cancels the request everywhere.
        """
        started = time.monotonic()
        first_token_s: float | None = None
        pieces: list[str] = []
        finished: inference_pb2.GenerateFinished | None = None
        try:
            async for response in self._stub.Generate(request, timeout=timeout_s):
                match response.WhichOneof("event"):
                    case "delta":
                        if first_token_s is None:
                            first_token_s = time.monotonic() - started
                        if response.delta.text:
                            pieces.append(response.delta.text)
                            on_text(response.delta.text)
                    case "finished":
                        finished = response.finished
        except grpc.aio.AioRpcError as error:
            raise operator_error(error, self.address) from None
        if finished is None:
            raise OperatorError(
                "INCOMPLETE", "the answer has no end", why="the gateway closed the stream early", fix="ask again"
            )
        total_s = time.monotonic() - started
        return make_answer("".join(pieces), finished, first_token_s=first_token_s or total_s, total_s=total_s)


def make_request(config: ClientConfig, turns: Sequence[tuple[str, str]]) -> inference_pb2.GenerateRequest:
    """The request that asks for the next turn after `turns` (role, content); as plain text only the last one counts."""
    request = inference_pb2.GenerateRequest()
    if config.prompt_as == "text":
        request.text = turns[-1][1]
    else:
        system = [("system", config.system)] if config.system else []
        for role, content in (*system, *turns):
            request.chat.messages.add(role=role, content=content)
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        if (value := getattr(config, name)) is not None:
            setattr(request.sampling, name, value)
    return request


def make_answer(text: str, finished: inference_pb2.GenerateFinished, *, first_token_s: float, total_s: float) -> Answer:
    """What the end of a stream says, beside what the client measured."""
    reason = common_pb2.FinishReason.Name(finished.finish_reason)
    return Answer(
        text=text,
        finish_reason=reason.removeprefix("FINISH_REASON_").lower(),
        prompt_tokens=finished.usage.prompt_tokens,
        completion_tokens=finished.usage.completion_tokens,
        cached_tokens=finished.usage.cached_tokens,
        prefill_worker=finished.handoff.prefill_worker,
        decode_worker=finished.handoff.decode_worker,
        transport=finished.handoff.transport,
        handoff_bytes=finished.handoff.handoff_bytes,
        handoff_blocks=finished.handoff.handoff_blocks,
        failed_handoffs=finished.handoff.failed_handoffs,
        first_token_s=first_token_s,
        total_s=total_s,
    )


def operator_error(error: grpc.aio.AioRpcError, address: str) -> OperatorError:
    """A failed call in the words of the command line."""
    failure = error_from_rpc(error)
    if type(failure) is UnavailableError:
        return PortError(
            "PEER_UNREACHABLE",
            f"no gateway answers at {address}",
            why="the connection was refused or lost",
            fix="staffetta serve demo",
        )
    if isinstance(failure, NotFoundError):
        return ModelNotFoundError(
            failure.reason, failure.message, why=f"the gateway at {address} says so", fix="staffetta ask --help"
        )
    reason = "DEADLINE_EXCEEDED" if failure.code is Code.DEADLINE_EXCEEDED else failure.reason
    retry = "try again" if failure.is_retryable else "staffetta ask --help"
    refused = OperatorError(reason, failure.message, why=f"the gateway at {address} refused the request", fix=retry)
    refused.exit_code = ExitCode.FAILURE
    return refused
