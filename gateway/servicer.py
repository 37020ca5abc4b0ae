"""The gRPC door: the same journey as REST, with deadlines and rich status errors.

Cancelling a call cancels everything behind it: handlers write through the context, so that the cancellation arrives
where they wait, and they always pass it on.
"""

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, NoReturn, assert_never

import grpc.aio
from google.protobuf.message import Message as WireMessage

from gateway.journey import Journeys
from gateway.prepare import check_model
from gateway.request import (
    ChatPrompt,
    Delta,
    Finished,
    JourneyRequest,
    Placed,
    Prompt,
    PromptLogprobs,
    Started,
    TextPrompt,
    TokenPrompt,
    new_request_id,
)
from gateway.template import Message
from gateway.workers import Workers
from staffetta import validate
from staffetta.errors import InvalidRequestError, StaffettaError
from staffetta.rpc.options import MAX_CLIENT_MESSAGE_BYTES
from staffetta.rpc.status import abort
from staffetta.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

MAX_MARGIN_S: Final = 0.05
"""How long before a call's deadline the server gives up, so that its answer, which names the phase, still arrives."""

log = logging.getLogger(__name__)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves clients. Event loop only."""

    def __init__(self, journeys: Journeys, workers: Workers) -> None:
        self._journeys = journeys
        self._workers = workers

    async def Generate(  # type: ignore[override]  # noqa: N802 - named by the wire
        self, request: inference_pb2.GenerateRequest, context: "Context"
    ) -> None:
        """Streams one generation."""
        arrival = asyncio.get_running_loop().time()
        remaining_s = context.time_remaining()
        request_id = new_request_id()
        try:
            validate.check_client_id(request.request_id, param="request_id")
            journey = JourneyRequest(
                id=request_id,
                model=request.model,
                prompt=_prompt_of(request),
                sampling=validate.sampling_of(request.sampling),
                arrival=arrival,
                deadline=None if remaining_s is None else arrival + remaining_s - min(MAX_MARGIN_S, remaining_s / 10),
                on_prefill_failure=request.on_prefill_failure,
            )
            async with aclosing(self._journeys.run(journey)) as events:
                async for event in events:
                    if not isinstance(event, Placed):
                        await context.write(_to_wire(event, request.request_id))
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status and the log the cause
            await _fail(context, error, request_id)

    async def GetModel(  # noqa: N802 - named by the wire
        self, request: inference_pb2.GetModelRequest, context: "Context"
    ) -> inference_pb2.GetModelResponse:
        """Describes the served model; what only workers know is unset while there is none."""
        model = self._journeys.model
        try:
            check_model(request.model, model)
        except StaffettaError as error:
            await _fail(context, error, "model")
        announcement = next((worker.announcement for worker in self._workers), None)
        return inference_pb2.GetModelResponse(
            model=model.name,
            model_digest=model.digest,
            numerics_digest=announcement.identity.numerics_digest if announcement else "",
            max_model_len=self._journeys.max_model_len(),
            vocab_size=model.limits.vocab_size,
            eos_token_ids=sorted(model.eos_token_ids),
            num_parameters=announcement.num_parameters if announcement else 0,
        )

    async def Tokenize(  # noqa: N802 - named by the wire
        self, request: inference_pb2.TokenizeRequest, context: "Context"
    ) -> inference_pb2.TokenizeResponse:
        """Token ids, exactly as Generate computes them."""
        try:
            check_model(request.model, self._journeys.model)
            response = inference_pb2.TokenizeResponse(token_ids=await self._journeys.tokenize(_input_of(request)))
            _check_size(response)
            return response
        except Exception as error:  # noqa: BLE001 - as in Generate
            await _fail(context, error, "tokenize")

    async def Detokenize(  # noqa: N802 - named by the wire
        self, request: inference_pb2.DetokenizeRequest, context: "Context"
    ) -> inference_pb2.DetokenizeResponse:
        """The text of token ids."""
        try:
            check_model(request.model, self._journeys.model)
            response = inference_pb2.DetokenizeResponse(text=await self._journeys.detokenize(request.token_ids))
            _check_size(response)
            return response
        except Exception as error:  # noqa: BLE001 - as in Generate
            await _fail(context, error, "detokenize")


def _check_size(response: WireMessage) -> None:
    """Refuses an answer that the client could not receive, in words that gRPC would not find."""
    if (num_bytes := response.ByteSize()) > MAX_CLIENT_MESSAGE_BYTES:
        raise InvalidRequestError(
            f"the answer would have {num_bytes} bytes, the limit is {MAX_CLIENT_MESSAGE_BYTES}; send less at once"
        )


async def _fail(context: "Context", error: Exception, request_id: str) -> NoReturn:
    if isinstance(error, StaffettaError):
        log.info("%s: %s: %s", request_id, error.reason, error.message)
    else:
        log.error("%s: an error that has no name", request_id, exc_info=error)
    await abort(context, error)


def _prompt_of(request: inference_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            return _chat(request.chat)
        case "tokens":
            return TokenPrompt(tuple(request.tokens.token_ids))
        case _:
            raise InvalidRequestError("prompt is unset; send text, chat or tokens", param="prompt")


def _input_of(request: inference_pb2.TokenizeRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            return _chat(request.chat)
        case _:
            raise InvalidRequestError("input is unset; send text or chat", param="input")


def _chat(chat: inference_pb2.ChatPrompt) -> ChatPrompt:
    return ChatPrompt(tuple(Message(message.role, message.content) for message in chat.messages))


def _to_wire(event: Started | PromptLogprobs | Delta | Finished, client_id: str) -> inference_pb2.GenerateResponse:
    match event:
        case Started():
            started = inference_pb2.GenerateStarted(
                id=event.id,
                request_id=client_id,
                model=event.model,
                seed=event.seed,
                prompt_tokens=len(event.prompt_token_ids),
            )
            return inference_pb2.GenerateResponse(started=started)
        case PromptLogprobs():
            return inference_pb2.GenerateResponse(
                prompt_logprobs=inference_pb2.PromptLogprobsDelta(tokens=event.tokens)
            )
        case Delta():
            delta = inference_pb2.GenerateDelta(choice_index=event.choice_index, text=event.text, tokens=event.tokens)
            return inference_pb2.GenerateResponse(delta=delta)
        case Finished():
            finished = inference_pb2.GenerateFinished(
                choice_index=event.choice_index,
                finish_reason=event.finish_reason,
                usage=event.usage,
                handoff=event.handoff,
                timings=event.timings,
                stop_string=event.stop_string,
            )
            return inference_pb2.GenerateResponse(finished=finished)
        case other:
            assert_never(other)
