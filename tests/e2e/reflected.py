"""A gRPC client that has nothing but an address: messages and methods come from the server's own reflection.

What works here works with grpcurl and with any generated client; no stub of this project is imported.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.e2e.answers import Answer, Handoff, ScoredToken

SERVICE: Final = "staffetta.v1.InferenceService"

_FINISH_REASONS: Final = {1: "stop", 2: "length", 3: "cancelled", 4: "error"}


@dataclass(frozen=True, slots=True)
class Choices:
    """All choices of one generation, in order, and its prompt's tokens from position 1 on, if scores were wanted."""

    answers: tuple[Answer, ...]
    seed: int
    prompt_tokens: tuple[ScoredToken, ...]

    @property
    def prompt_logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the prompt's tokens alone."""
        return tuple(token.logprob for token in self.prompt_tokens)


class ReflectedClient:
    """`InferenceService` of one gateway. Make it inside the event loop that uses it."""

    def __init__(self, address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            self.services = frozenset(database.get_services())
            self._service = DescriptorPool(database).FindServiceByName(SERVICE)
        self.channel = grpc.aio.insecure_channel(address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()

    def call(self, method: str, *, timeout_s: float | None = None, **fields: object) -> Any:
        """Starts a call with a request of these fields; submessages are given as dicts."""
        descriptor = self._service.methods_by_name[method]
        request_class, response_class = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
        start = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        return start(
            f"/{SERVICE}/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )(request_class(**fields), timeout=timeout_s)

    async def generate(self, *, timeout_s: float = 60.0, **fields: object) -> Answer:
        """Runs one generation of a single choice to its end."""
        (answer,) = (await self.generate_choices(timeout_s=timeout_s, **fields)).answers
        return answer

    async def generate_choices(self, *, timeout_s: float = 60.0, **fields: object) -> Choices:
        """Runs one generation to its end. Raises AssertionError when the order of events or of tokens is broken."""
        deltas: defaultdict[int, list[Any]] = defaultdict(list)
        finished: dict[int, Any] = {}
        scores: list[Any] = []
        started: Any = None
        async for response in self.call("Generate", timeout_s=timeout_s, **fields):
            kind = response.WhichOneof("event")
            assert (started is None) == (kind == "started"), f"{kind} is out of order"
            if kind == "started":
                started = response.started
            elif kind == "prompt_logprobs":
                assert not deltas, "the prompt's log-probabilities came after output"
                scores.extend(response.prompt_logprobs.tokens)
            else:
                event = getattr(response, kind)
                assert event.choice_index not in finished, f"{kind} came after the end"
                if kind == "delta":
                    deltas[event.choice_index].append(event)
                else:
                    finished[event.choice_index] = event
        assert sorted(finished) == list(range(len(finished))) != [], f"the choices that ended are {sorted(finished)}"
        assert deltas.keys() <= finished.keys(), "a choice has no end"
        positions = [token.index for token in scores]
        assert positions == list(range(1, 1 + len(scores))), f"positions are {positions}"
        return Choices(
            answers=tuple(make_answer(started, deltas[index], finished[index]) for index in sorted(finished)),
            seed=started.seed,
            prompt_tokens=tuple(ScoredToken(token.token_id, token.logprob, _alternatives(token)) for token in scores),
        )


def make_answer(started: Any, deltas: Sequence[Any], finished: Any) -> Answer:
    """One answer of a stream's events. Raises AssertionError when a token is missing or came twice."""
    tokens = [token for delta in deltas for token in delta.tokens]
    indices = [token.index for token in tokens]
    assert indices == list(range(len(tokens))), f"token indices are {indices}"
    assert finished.usage.completion_tokens == len(tokens), "usage counts other tokens than were sent"
    assert finished.usage.prompt_tokens == started.prompt_tokens, "the prompt has two sizes"
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=tuple(token.logprob for token in tokens if token.HasField("logprob")),
        finish_reason=_FINISH_REASONS[finished.finish_reason],
        prompt_tokens=started.prompt_tokens,
        cached_tokens=finished.usage.cached_tokens,
        handoff=Handoff.from_message(finished.handoff),
        top_logprobs=tuple(map(_alternatives, tokens)),
    )


def _alternatives(token: Any) -> tuple[tuple[int, float], ...]:
    return tuple((top.token_id, top.logprob) for top in token.top_logprobs)


def greedy(max_tokens: int, **others: object) -> Mapping[str, object]:
    """Sampling that has no randomness and does not stop early."""
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **others}
