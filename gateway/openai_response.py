"""Writes answers in OpenAI's shapes: whole, or as the chunks of a stream. Pure functions and one small state per
answer.

What this server adds is under the one key `staffetta`, which clients of that API leave alone, or has the name that
servers of open models gave it.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final

from gateway.json_text import to_json
from gateway.openai_logprobs import Json, TextLogprobs, chat_logprobs, prompt_logprobs
from gateway.openai_request import ParsedRequest
from gateway.request import Delta, Finished, Placed, Started, TextPrompt
from gateway.text import Text
from gateway.text_chunks import TextChunks
from staffetta.v1 import common_pb2

DECODE_WORKER: Final = "staffetta-decode-worker"
"""The header that names the decode worker."""
FINGERPRINT_CHARS: Final = 12

_FINISH_REASONS: Final = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class Shape(ABC):
    """How the answers of one endpoint look. One instance per request, made when it has started."""

    def __init__(self, parsed: ParsedRequest, started: Started, text: Text, *, head: Json) -> None:
        """`head` is what every chunk begins with."""
        self._parsed = parsed
        self._started = started
        self._text = text
        self._head = head | {"model": started.model}
        self._prompt_tokens: list[common_pb2.Token] = []
        self._has_token_news = self._has_logprobs or parsed.has_token_ids
        self._text_chunks = TextChunks(lambda index, text: self._chunk(self._delta_choice(Delta(index, text, ()))))
        self.text: Final = self._text_chunks.encode
        """The chunk for new text of a choice, encoded, where that is all there is to show."""

    def place(self, placed: Placed) -> None:
        """Takes what names the worker's arithmetic: while it is the same, a seed repeats an answer to the bit."""
        self._head["system_fingerprint"] = placed.numerics_digest[:FINGERPRINT_CHARS]
        self._text_chunks.forget()

    def score(self, tokens: Sequence[common_pb2.Token]) -> None:
        """Takes further prompt tokens with their log-probabilities; all come before any output."""
        self._prompt_tokens.extend(tokens)

    @abstractmethod
    def opening(self) -> Iterator[Json]:
        """The chunks that open a stream, in the order of the choices; none where nothing precedes the output.

        Made one at a time: with a prompt's log-probabilities each is long.
        """

    def delta(self, delta: Delta) -> bytes | None:
        """The chunk for new output, encoded; None while text is held back and nothing else was asked for."""
        if not self._parsed.has_output:
            return None
        if self._has_token_news and delta.tokens:
            return to_json(self._chunk(self._delta_choice(delta)))
        return self._text_chunks.encode(delta.choice_index, delta.text) if delta.text else None

    @property
    def is_text_only(self) -> bool:
        """Whether new output is shown by its text and by nothing else."""
        return self._parsed.has_output and not self._has_token_news

    def finish(self, finished: Finished) -> Json:
        """The chunk that ends a choice, with what this server tells beyond the API."""
        choice = self._delta_choice(Delta(finished.choice_index, "", ())) | self._ending(finished)
        return self._chunk(choice) | {"staffetta": extension(self._started, finished)}

    def usage(self, finished: Sequence[Finished]) -> Json:
        """The chunk that counts what was used; it has no choice."""
        return self._head | {"choices": [], "usage": self._usage(finished)}

    def whole(self, deltas: Sequence[Delta], finished: Sequence[Finished]) -> Json:
        """The answer in one piece; `finished` has every choice, in the order in which they ended."""
        by_choice: defaultdict[int, list[Delta]] = defaultdict(list)
        for delta in deltas:
            by_choice[delta.choice_index].append(delta)
        choices = [
            self._whole_choice(_joined(end.choice_index, by_choice[end.choice_index])) | self._ending(end)
            for end in sorted(finished, key=lambda end: end.choice_index)
        ]
        # Whichever ended last has the durations of the whole request; the hand-off is the same in all.
        extra = extension(self._started, finished[-1])
        return self._head | {"choices": choices, "usage": self._usage(finished), "staffetta": extra}

    @property
    def _has_logprobs(self) -> bool:
        return self._parsed.sampling.logprobs is not None

    @property
    def _num_choices(self) -> int:
        return self._parsed.sampling.n or 1

    @abstractmethod
    def _delta_choice(self, delta: Delta) -> Json:
        """The choice in the chunk of a delta; its ending is null."""

    @abstractmethod
    def _whole_choice(self, output: Delta) -> Json:
        """A choice of an answer in one piece, of all its output; its ending is to follow."""

    def _ending(self, finished: Finished) -> Json:
        """Why a choice ended, as the API names it, and by which stop string or token id of the request's own."""
        if not self._parsed.has_output:
            return {"finish_reason": "length", "stop_reason": None}
        stop = finished.stop_token_id if finished.stop_string is None else finished.stop_string
        return {"finish_reason": _FINISH_REASONS[finished.finish_reason], "stop_reason": stop}

    def _usage(self, finished: Sequence[Finished]) -> Json:
        """The prompt counts once, whatever the number of choices; output that is not shown does not count."""
        num_prompt_tokens = len(self._started.prompt_token_ids)
        num_tokens = sum(end.usage.completion_tokens for end in finished) if self._parsed.has_output else 0
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "prompt_tokens_details": {"cached_tokens": max(end.usage.cached_tokens for end in finished)},
        }

    def _chunk(self, choice: Json) -> Json:
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._parsed.has_usage_chunk else chunk

    def _ids(self, tokens: Sequence[common_pb2.Token]) -> Json:
        return {"token_ids": [token.token_id for token in tokens]} if tokens and self._parsed.has_token_ids else {}

    @cached_property
    def _about_prompt(self) -> Json:
        """The prompt's token ids and log-probabilities, as far as asked for. Whole when the first output has come."""
        about: Json = {}
        if self._parsed.has_token_ids:
            about["prompt_token_ids"] = list(self._started.prompt_token_ids)
        if (num_top := self._parsed.num_prompt_logprobs) is not None:
            about["prompt_logprobs"] = prompt_logprobs(self._text, self._prompt_tokens, num_top=num_top)
        return about


class ChatShape(Shape):
    """/v1/chat/completions."""

    def __init__(self, parsed: ParsedRequest, started: Started, text: Text, *, created: int) -> None:
        kind = "chat.completion.chunk" if parsed.is_stream else "chat.completion"
        head: Json = {"id": f"chatcmpl-{started.id}", "object": kind, "created": created}
        super().__init__(parsed, started, text, head=head)

    def opening(self) -> Iterator[Json]:
        """The chunks that open each choice with the role."""
        delta: Json = {"role": "assistant", "content": ""}
        for index in range(self._num_choices):
            choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._chunk(choice) | self._about_prompt

    def whole(self, deltas: Sequence[Delta], finished: Sequence[Finished]) -> Json:
        """The answer in one piece; the prompt is not a choice's."""
        return super().whole(deltas, finished) | self._about_prompt

    def _delta_choice(self, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text or delta.tokens else {}
        choice: Json = {
            "index": delta.choice_index,
            "delta": content,
            "logprobs": self._logprobs(delta.tokens) if delta.tokens else None,
            "finish_reason": None,
        }
        return choice | self._ids(delta.tokens)

    def _whole_choice(self, output: Delta) -> Json:
        choice: Json = {
            "index": output.choice_index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.tokens),
        }
        return choice | self._ids(output.tokens)

    def _logprobs(self, tokens: Sequence[common_pb2.Token]) -> Json | None:
        return chat_logprobs(self._text, tokens) if self._has_logprobs else None


class CompletionShape(Shape):
    """/v1/completions. With `echo`, each choice's text and lists begin with the prompt's."""

    def __init__(self, parsed: ParsedRequest, started: Started, text: Text, *, created: int) -> None:
        head: Json = {"id": f"cmpl-{started.id}", "object": "text_completion", "created": created}
        super().__init__(parsed, started, text, head=head)
        num_top = parsed.sampling.logprobs or 0
        self._lists = [TextLogprobs(text, num_top=num_top) for _ in range(self._num_choices)]

    def opening(self) -> Iterator[Json]:
        """What there is of the prompt: its text and log-probabilities to echo, its token ids."""
        if not self._parsed.has_echo and not self._parsed.has_token_ids:
            return
        for index in range(self._num_choices):
            yield self._chunk(self._choice(self._echo(index)) | {"finish_reason": None} | self._about_prompt)

    def _delta_choice(self, delta: Delta) -> Json:
        return self._choice(delta) | {"finish_reason": None} | self._ids(delta.tokens)

    def _whole_choice(self, output: Delta) -> Json:
        shown = output if self._parsed.has_output else Delta(output.choice_index, "", ())
        echoed = _joined(output.choice_index, (self._echo(output.choice_index), shown))
        return self._choice(echoed) | self._ids(shown.tokens) | self._about_prompt

    def _choice(self, output: Delta) -> Json:
        lists = self._lists[output.choice_index].take(output.tokens) if self._has_logprobs and output.tokens else None
        return {"index": output.choice_index, "text": output.text, "logprobs": lists}

    def _echo(self, choice_index: int) -> Delta:
        """The prompt as if it were output; empty unless it was asked for."""
        if not self._parsed.has_echo:
            return Delta(choice_index, "", ())
        prompt = self._parsed.prompt
        token_ids = self._started.prompt_token_ids
        text = prompt.text if isinstance(prompt, TextPrompt) else self._text.decode(token_ids)
        first = common_pb2.Token(token_id=token_ids[0])
        return Delta(choice_index, text, (first, *self._prompt_tokens))


def extension(started: Started, finished: Finished) -> Json:
    """The object under `staffetta`: what a client may want to know of the relay."""
    handoff, timings = finished.handoff, finished.timings
    return {
        "id": started.id,
        "seed": started.seed,
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
    """What an answer in one piece says in its headers, by the choice that ended last; what there was not has none."""
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


def _joined(choice_index: int, deltas: Sequence[Delta]) -> Delta:
    """Deltas of one choice as one."""
    text = "".join(delta.text for delta in deltas)
    return Delta(choice_index, text, tuple(token for delta in deltas for token in delta.tokens))
