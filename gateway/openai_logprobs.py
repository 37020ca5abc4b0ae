"""Writes log-probabilities in the three shapes that clients read: chat's, the older one of completions, and the one
that servers of open models have for a prompt. Pure functions and one small state; never decides what was asked for.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

from gateway.text import Text
from staffetta.v1 import common_pb2

Json = dict[str, object]

LEAST_LOGPROB: Final = -9999.0
"""What stands for a probability of zero: JSON has no infinity."""


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB


def chat_logprobs(text: Text, tokens: Iterable[common_pb2.Token]) -> Json:
    """The tokens of a chat's choice, each with its likeliest alternatives."""

    def entry(token_id: int, logprob: float) -> Json:
        return {
            "token": text.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(text.token_bytes(token_id)),
        }

    content = [
        entry(token.token_id, token.logprob)
        | {"top_logprobs": [entry(top.token_id, top.logprob) for top in token.top_logprobs]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The older shape, lists beside each other, for one choice whose text grows. Special tokens take no text."""

    def __init__(self, text: Text, *, num_top: int) -> None:
        self._text = text
        self._num_top = num_top
        self._offset = 0

    def take(self, tokens: Iterable[common_pb2.Token]) -> Json:
        """The lists for the next tokens. One without a log-probability, as a prompt's first, has null in two of them.

        Alternatives are keyed by their text; of several with the same text the likeliest counts.
        """
        texts: list[str] = []
        offsets: list[int] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            text = self._text.token_text(token.token_id)
            has_logprob = token.HasField("logprob")
            texts.append(text)
            offsets.append(self._offset)
            logprobs.append(finite(token.logprob) if has_logprob else None)
            tops.append(self._alternatives(token) if has_logprob else None)
            self._offset += 0 if self._text.is_special(token.token_id) else len(text)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _alternatives(self, token: common_pb2.Token) -> dict[str, float]:
        found: dict[str, float] = {}
        for top in token.top_logprobs[: self._num_top]:
            found.setdefault(self._text.token_text(top.token_id), finite(top.logprob))
        return found


def prompt_logprobs(text: Text, tokens: Sequence[common_pb2.Token], *, num_top: int) -> list[Json | None]:
    """A prompt's log-probabilities, first position first, which has none: for each, by token id, its own token and then
    the likeliest alternatives. `rank` counts from 1; null for a token that is not among them."""

    def entry(token_id: int, logprob: float, rank: int | None) -> Json:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text.token_text(token_id)}

    positions: list[Json | None] = [None]
    for token in tokens:
        ranked = {top.token_id: (rank, top.logprob) for rank, top in enumerate(token.top_logprobs[:num_top], start=1)}
        own_rank, _ = ranked.get(token.token_id, (None, 0.0))
        position: Json = {str(token.token_id): entry(token.token_id, token.logprob, own_rank)}
        for token_id, (rank, logprob) in ranked.items():
            position.setdefault(str(token_id), entry(token_id, logprob, rank))
        positions.append(position)
    return positions
