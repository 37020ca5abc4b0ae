"""Writes answers in OpenAI's shapes: whole, or as the chunks of a stream. Pure functions and one small state per
answer.

What this server adds is under the one key `staffetta`, which clients of that API leave alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Final

from gateway.openai_request import ParsedRequest
from gateway.request import Delta, Finished, Started
from gateway.text import Text
from staffetta.v1 import common_pb2

Json = dict[str, object]

DECODE_WORKER: Final = "staffetta-decode-worker"
"""The header that names the decode worker."""
LEAST_LOGPROB: Final = -9999.0
"""What stands for a probability of zero: JSON has no infinity."""

_FINISH_REASONS: Final = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class Shape(ABC):
    """How the answers of one endpoint look. One instance per request, made when it has started."""

    def __init__(self, parsed: ParsedRequest, started: Started, text: Text, *, head: Json) -> None:
        """`head` is what every chunk begins with."""
        self._started = started
        self._text = text
        self._head = head | {"model": started.model}
        self._has_logprobs = parsed.sampling.logprobs is not None
        self._has_token_ids = parsed.has_token_ids
        self._has_usage = parsed.has_usage_chunk

    @abstractmethod
    def first(self) -> Json | None:
        """The chunk that opens a stream, if there is one."""

    @abstractmethod
    def delta(self, delta: Delta) -> Json | None:
        """The chunk for new output; None while text is held back and nothing else was asked for."""

    @abstractmethod
    def finish(self, finished: Finished) -> Json:
        """The chunk that ends the choice, with what this server tells beyond the API."""

    @abstractmethod
    def whole(self, deltas: Sequence[Delta], finished: Finished) -> Json:
        """The answer in one piece."""

    def usage(self, finished: Finished) -> Json:
        """The chunk that counts what was used; it has no choice."""
        return self._head | {"choices": [], "usage": usage(finished)}

    def _is_worth_a_chunk(self, delta: Delta) -> bool:
        return bool(delta.text) or (bool(delta.tokens) and (self._has_logprobs or self._has_token_ids))

    def _chunk(self, choice: Json) -> Json:
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._has_usage else chunk

    def _answer(self, choice: Json, finished: Finished) -> Json:
        extra = extension(self._started, finished)
        return self._head | {"choices": [choice], "usage": usage(finished), "staffetta": extra}

    def _ids(self, tokens: Sequence[common_pb2.Token]) -> Json:
        return {"token_ids": [token.token_id for token in tokens]} if tokens and self._has_token_ids else {}

    def _prompt_ids(self) -> Json:
        return {"prompt_token_ids": list(self._started.prompt_token_ids)} if self._has_token_ids else {}


class ChatShape(Shape):
    """/v1/chat/completions."""

    def __init__(self, parsed: ParsedRequest, started: Started, text: Text, *, created: int) -> None:
        kind = "chat.completion.chunk" if parsed.is_stream else "chat.completion"
        head: Json = {"id": f"chatcmpl-{started.id}", "object": kind, "created": created}
        super().__init__(parsed, started, text, head=head)

    def first(self) -> Json:
        """The chunk that opens the stream with the role."""
        return self._chunk(self._choice({"role": "assistant", "content": ""}, None, ())) | self._prompt_ids()

    def delta(self, delta: Delta) -> Json | None:
        """The chunk for new output; None while text is held back and nothing else was asked for."""
        if not self._is_worth_a_chunk(delta):
            return None
        return self._chunk(self._choice({"content": delta.text}, None, delta.tokens))

    def finish(self, finished: Finished) -> Json:
        """The chunk that ends the choice, with what this server tells beyond the API."""
        choice = self._choice({}, finish_reason(finished), ())
        return self._chunk(choice) | {"staffetta": extension(self._started, finished)}

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> Json:
        """The answer in one piece."""
        tokens = [token for delta in deltas for token in delta.tokens]
        message: Json = {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None}
        choice: Json = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason(finished),
        }
        return self._answer(choice | self._ids(tokens), finished) | self._prompt_ids()

    def _choice(self, delta: Json, reason: str | None, tokens: Sequence[common_pb2.Token]) -> Json:
        logprobs = self._logprobs(tokens) if tokens else None
        choice: Json = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return choice | self._ids(tokens)

    def _logprobs(self, tokens: Iterable[common_pb2.Token]) -> Json | None:
        if not self._has_logprobs:
            return None
        content = [
            self._logprob(token.token_id, token.logprob)
            | {"top_logprobs": [self._logprob(top.token_id, top.logprob) for top in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self._text.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._text.token_bytes(token_id)),
        }


class CompletionShape(Shape):
    """/v1/completions."""

    def __init__(self, parsed: ParsedRequest, started: Started, text: Text, *, created: int) -> None:
        head: Json = {"id": f"cmpl-{started.id}", "object": "text_completion", "created": created}
        super().__init__(parsed, started, text, head=head)
        self._offset = 0

    def first(self) -> Json | None:
        """Nothing opens this stream, unless the prompt's token ids were asked for."""
        prompt_ids = self._prompt_ids()
        return self._chunk(self._choice("", None, ()) | prompt_ids) if prompt_ids else None

    def delta(self, delta: Delta) -> Json | None:
        """The chunk for new output; None while text is held back and nothing else was asked for."""
        return self._chunk(self._choice(delta.text, None, delta.tokens)) if self._is_worth_a_chunk(delta) else None

    def finish(self, finished: Finished) -> Json:
        """The chunk that ends the choice, with what this server tells beyond the API."""
        choice = self._choice("", finish_reason(finished), ())
        return self._chunk(choice) | {"staffetta": extension(self._started, finished)}

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> Json:
        """The answer in one piece."""
        tokens = [token for delta in deltas for token in delta.tokens]
        choice = self._choice("".join(delta.text for delta in deltas), finish_reason(finished), tokens)
        return self._answer(choice | self._prompt_ids(), finished)

    def _choice(self, text: str, reason: str | None, tokens: Sequence[common_pb2.Token]) -> Json:
        logprobs = self._logprobs(tokens) if tokens and self._has_logprobs else None
        choice: Json = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice | self._ids(tokens)

    def _logprobs(self, tokens: Iterable[common_pb2.Token]) -> Json:
        texts: list[str] = []
        offsets: list[int] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        for token in tokens:
            text = self._text.token_text(token.token_id)
            texts.append(text)
            offsets.append(self._offset)
            logprobs.append(finite(token.logprob))
            tops.append({self._text.token_text(top.token_id): finite(top.logprob) for top in token.top_logprobs})
            self._offset += len(text)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def finish_reason(finished: Finished) -> str:
    """Why the choice ended, as the API names it."""
    return _FINISH_REASONS[finished.finish_reason]


def usage(finished: Finished) -> Json:
    """What was used."""
    used = finished.usage
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def extension(started: Started, finished: Finished) -> Json:
    """The object under `staffetta`: what a client may want to know of the relay."""
    handoff, timings = finished.handoff, finished.timings
    return {
        "id": started.id,
        "seed": started.seed,
        "stop_string": finished.stop_string,
        "handoff": {
            "prefill_worker": handoff.prefill_worker,
            "decode_worker": handoff.decode_worker,
            "transport": handoff.transport,
            "handoff_bytes": handoff.handoff_bytes,
            "handoff_blocks": handoff.handoff_blocks,
            "locally_prefilled_tokens": handoff.locally_prefilled_tokens,
            "failed_handoffs": handoff.failed_handoffs,
            "prefill_cached_tokens": handoff.prefill_cached_tokens,
        },
        "timings": {
            "gateway_s": timings.gateway_s,
            "queue_s": timings.queue_s,
            "prefill_s": timings.prefill_s,
            "transfer_s": timings.transfer_s,
            "decode_s": timings.decode_s,
        },
    }


def headers(finished: Finished) -> dict[str, str]:
    """What an answer in one piece says in its headers; what there was not has none."""
    timings = finished.timings
    phases = (
        ("gateway", timings.gateway_s),
        ("queue", timings.queue_s),
        ("prefill", timings.prefill_s),
        ("transfer", timings.transfer_s),
        ("decode", timings.decode_s),
    )
    found = {
        "server-timing": ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases),
        "staffetta-prefill-worker": finished.handoff.prefill_worker,
        DECODE_WORKER: finished.handoff.decode_worker,
    }
    return {name: value for name, value in found.items() if value}


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB
