"""What both doors hand to the journey, and what the journey hands back. Values only."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.template import Message
from staffetta.v1 import common_pb2
from staffetta.validate import Sampling


def new_request_id() -> str:
    """128 random bits in hexadecimal; nobody can guess another's request."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; the tokenizer's own special tokens are added."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat, rendered by the model's template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class JourneyRequest:
    """One request as a door read it, unchecked.

    `id` is its name inside the system, from `new_request_id`. `model` empty means the only one served.
    `default_max_tokens` applies where `sampling.max_tokens` is None; None is what the context leaves. `arrival` and
    `deadline` are in seconds of the event loop's clock.
    """

    id: str
    model: str
    prompt: Prompt
    sampling: Sampling
    arrival: float
    deadline: float | None = None
    default_max_tokens: int | None = None
    on_prefill_failure: common_pb2.PrefillFailurePolicy.ValueType = common_pb2.PREFILL_FAILURE_POLICY_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: `id` is the request's name inside the system, `seed` the one in use, given or drawn."""

    id: str
    model: str
    seed: int
    prompt_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Placed:
    """The request is with a decode worker; comes again when that one is lost before any output.

    `numerics_digest` names the worker's arithmetic: where it is equal, equal requests get equal bits. `is_stalled`
    says, whenever asked, whether the worker's engine stands still.
    """

    decode_worker: str
    numerics_digest: str
    is_stalled: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Further prompt tokens with their log-probabilities, from position 1 on; all come before the first Delta."""

    tokens: tuple[common_pb2.Token, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one choice, never what was sent before. `text` may lag behind `tokens`."""

    choice_index: int
    text: str
    tokens: tuple[common_pb2.Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of one choice; that of the last choice ends the request.

    `usage` counts the prompt and this choice's tokens. `timings` add up to the time from arrival to this event.
    """

    choice_index: int
    finish_reason: common_pb2.FinishReason.ValueType
    usage: common_pb2.Usage
    handoff: common_pb2.HandoffReport
    timings: common_pb2.PhaseTimings
    stop_string: str | None
    stop_token_id: int | None
    """The one of the request's own that ended the choice; an end-of-sequence token is none of them."""


Event = Started | Placed | PromptLogprobs | Delta | Finished


class TextSink(Protocol):
    """Where text may go at once, without an event, by who asks for no more than text. Event loop only."""

    def is_open(self) -> bool:
        """Whether it takes text now. It does not before the first Delta, and not while its client does not read."""

    def put(self, choice_index: int, text: str) -> None:
        """Takes what a Delta would have said: all that is new, after every event so far. Only while it is open."""
