"""An answer as a client saw it, the same whichever door it came through."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self


@dataclass(frozen=True, slots=True)
class Handoff:
    """How the prompt's KV reached the decode worker, as the answer reports it."""

    prefill_worker: str
    decode_worker: str
    transport: str
    handoff_bytes: int
    handoff_blocks: int
    locally_prefilled_tokens: int
    failed_handoffs: int
    prefill_cached_tokens: int

    @classmethod
    def from_message(cls, message: Any) -> Self:
        """From a `HandoffReport`, of whatever generated or reflected class."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> Self:
        """From the `handoff` object of a REST answer."""
        return cls(**report)


class ScoredToken(NamedTuple):
    """A prompt's token with its log-probability, and the likeliest tokens in its place with theirs."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished generation. `token_ids` is empty where a door was not asked for them."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    handoff: Handoff
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Token ids and log-probabilities of each token's likeliest alternatives; empty where a door does not read them."""
