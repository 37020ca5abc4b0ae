"""The one request validator: what a request may hold, and by how much.

Both of the gateway's doors and every worker ask here, so that no bound exists twice. Pure functions over values: each
returns nothing, or raises an `InvalidRequestError` that names the field, its value, the limit and the fix. Never
touches a tokenizer, a model or a socket.
"""

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from staffetta.errors import ContextLengthExceededError, InvalidRequestError
from staffetta.v1 import common_pb2, decode_pb2

MAX_TEMPERATURE: Final = 2.0
MIN_REPETITION_PENALTY: Final = 2.0**-20
"""About a millionth, exact in float32: divided by much less, a logit would be no finite number any more."""
MAX_REPETITION_PENALTY: Final = 2.0
MAX_PENALTY: Final = 2.0
"""Of presence and frequency, which are taken from a logit; as far below 0."""
MAX_CHOICES: Final = 16
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_PROMPT_SCORES: Final = 2**18
"""Log-probabilities that one answer may hold of its prompt: some 20 MB of JSON."""
MAX_MESSAGES: Final = 4096
MAX_TEXT_CHARS: Final = 4 * 2**20
MAX_SALT_BYTES: Final = 64
ROLES: Final = ("system", "user", "assistant")

_UINT32_MAX: Final = 2**32 - 1
_UINT64_MAX: Final = 2**64 - 1
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_ID = re.compile(r"[\x20-\x7e]{0,128}")
_REQUEST_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Parameters of sampling as asked for, with the meanings that the wire's `SamplingParams` states.

    None means that the model's default applies.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model allows: ids below `vocab_size`, prompt and generated tokens together up to `max_model_len`."""

    vocab_size: int
    max_model_len: int


def sampling_of(params: common_pb2.SamplingParams) -> Sampling:
    """The values of a wire message, unchecked; unset fields become None."""

    def optional(name: str) -> bool:
        return params.HasField(name)  # type: ignore[arg-type]

    return Sampling(
        temperature=params.temperature if optional("temperature") else None,
        top_p=params.top_p if optional("top_p") else None,
        top_k=params.top_k if optional("top_k") else None,
        seed=params.seed if optional("seed") else None,
        max_tokens=params.max_tokens if optional("max_tokens") else None,
        min_tokens=params.min_tokens if optional("min_tokens") else None,
        stop_token_ids=tuple(params.stop_token_ids),
        stop=tuple(params.stop),
        ignore_eos=params.ignore_eos if optional("ignore_eos") else None,
        logprobs=params.logprobs if optional("logprobs") else None,
        n=params.n if optional("n") else None,
        repetition_penalty=params.repetition_penalty if optional("repetition_penalty") else None,
        presence_penalty=params.presence_penalty if optional("presence_penalty") else None,
        frequency_penalty=params.frequency_penalty if optional("frequency_penalty") else None,
        prompt_logprobs=params.prompt_logprobs if optional("prompt_logprobs") else None,
    )


def num_choices(sampling: Sampling) -> int:
    """How many continuations are asked for. Raises InvalidRequestError for none and for too many.

    There is no bound on n × (prompt and `max_tokens`): choices share the prompt's blocks and are preempted one by one,
    so what a request can take is bounded by this number and by the context, which each choice must fit on its own.
    Whoever bounds what it holds at once counts choices, each of which may take as much as a request of its own.
    """
    wanted = 1 if sampling.n is None else sampling.n
    if not 1 <= wanted <= MAX_CHOICES:
        raise _outside("n", wanted, f"1 to {MAX_CHOICES}")
    return wanted


def check_sampling(sampling: Sampling, limits: Limits) -> None:
    """Checks every value against its own bounds, and `min_tokens` against `max_tokens`."""
    num_choices(sampling)
    if sampling.temperature is not None:
        _check_real(sampling.temperature, "temperature")
        if not 0 <= sampling.temperature <= MAX_TEMPERATURE:
            raise _outside("temperature", sampling.temperature, "0 to 2; 0 is greedy")
    if sampling.top_p is not None:
        _check_real(sampling.top_p, "top_p")
        if not 0 < as_float32(sampling.top_p) <= 1:
            raise _outside("top_p", sampling.top_p, "above 0 up to 1; 1 keeps every token")
    _check_penalties(sampling)
    _check_count(sampling.top_k, "top_k", "0 to 4294967295; 0 keeps every token")
    _check_count(sampling.min_tokens, "min_tokens", "0 to max_tokens")
    _check_count(sampling.logprobs, "logprobs", f"0 to {MAX_LOGPROBS}", largest=MAX_LOGPROBS)
    _check_count(sampling.prompt_logprobs, "prompt_logprobs", f"0 to {MAX_LOGPROBS}", largest=MAX_LOGPROBS)
    if sampling.seed is not None and not 0 <= sampling.seed <= _UINT64_MAX:
        raise _outside("seed", sampling.seed, "0 to 18446744073709551615")
    if sampling.max_tokens is not None and not 1 <= sampling.max_tokens <= _UINT32_MAX:
        raise _outside("max_tokens", sampling.max_tokens, "1 or more")
    if sampling.min_tokens and sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {sampling.min_tokens}, above max_tokens, which is {sampling.max_tokens}; lower it",
            param="min_tokens",
        )
    _check_stops(sampling, limits)


def check_token_ids(token_ids: Sequence[int], limits: Limits, *, param: str = "prompt") -> None:
    """Refuses an id outside the vocabulary. An empty sequence passes."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limits.vocab_size)
        raise InvalidRequestError(
            f"{param} holds token id {wrong}; the vocabulary has ids 0 to {limits.vocab_size - 1}", param=param
        )


def check_budget(num_prompt_tokens: int, max_tokens: int | None, limits: Limits, *, param: str = "prompt") -> None:
    """Refuses an empty prompt, and one that leaves no room for `max_tokens` (None: for a single token)."""
    if num_prompt_tokens < 1:
        raise InvalidRequestError(f"{param} has no tokens; send at least one", param=param)
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt_tokens + wanted > limits.max_model_len:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {limits.max_model_len} tokens. The request has "
            f"{num_prompt_tokens} in the prompt and asks for {'at least ' if max_tokens is None else ''}{wanted} more, "
            f"together {num_prompt_tokens + wanted}; shorten the prompt or lower max_tokens.",
            param=param,
        )


def check_prompt_scores(num_prompt_tokens: int, sampling: Sampling) -> None:
    """Refuses to score a prompt when the answer, which tells the scores once for each choice, would be too long."""
    if sampling.prompt_logprobs is None:
        return
    each = num_prompt_tokens * (sampling.prompt_logprobs + 1)
    if each * num_choices(sampling) > MAX_PROMPT_SCORES:
        raise InvalidRequestError(
            f"{num_prompt_tokens} prompt tokens with {sampling.prompt_logprobs} alternatives for n = "
            f"{num_choices(sampling)} choices are {each * num_choices(sampling)} log-probabilities, the limit is "
            f"{MAX_PROMPT_SCORES}; ask for fewer alternatives or choices, or for parts of the prompt",
            param="prompt_logprobs",
        )


def check_text(text: str, *, param: str = "prompt") -> None:
    """Refuses an empty text, an overlong one, and one that is not Unicode."""
    if not text:
        raise InvalidRequestError(f"{param} is empty; send at least one character", param=param)
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidRequestError(
            f"{param} has {len(text)} characters, the limit is {MAX_TEXT_CHARS}; shorten it", param=param
        )
    check_unicode(text, param=param)


def check_unicode(text: str, *, param: str) -> None:
    """Refuses text that no UTF-8 can hold: JSON escapes can spell half a surrogate pair."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidRequestError(f"{param} holds half a surrogate pair; send whole characters", param=param)


def check_chat(messages: Sequence[tuple[str, str]]) -> None:
    """Checks (role, content) pairs: how many, which roles, how much text in all."""
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries, the limit is {MAX_MESSAGES}; shorten the conversation",
            param="messages",
        )
    num_chars = 0
    for index, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise InvalidRequestError(
                f"messages[{index}].role is {role[:32]!r}; use one of {', '.join(ROLES)}",
                param=f"messages[{index}].role",
            )
        check_unicode(content, param=f"messages[{index}].content")
        num_chars += len(content)
    if num_chars > MAX_TEXT_CHARS:
        raise InvalidRequestError(
            f"messages have {num_chars} characters, the limit is {MAX_TEXT_CHARS}; shorten them", param="messages"
        )


def check_name(name: str, *, param: str) -> None:
    """Refuses a model or worker name outside `[A-Za-z0-9._-]{1,64}`."""
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"{param} {name[:64]!r} is not a name; use 1 to 64 of the characters A-Z a-z 0-9 . _ -", param=param
        )


def check_client_id(client_id: str, *, param: str) -> None:
    """Refuses a client's own id of a request unless it can be echoed anywhere, headers included. Empty means none."""
    if _CLIENT_ID.fullmatch(client_id) is None:
        raise InvalidRequestError(f"{param} is not up to 128 printable ASCII characters; shorten it", param=param)


def check_start(request: decode_pb2.StartRequest, limits: Limits) -> None:
    """Checks all of what a worker is asked to start: the gateway's word is not enough.

    Sampling must be resolved: temperature, top_p, top_k, seed and max_tokens set, stop strings left at the gateway.
    """
    if _REQUEST_ID.fullmatch(request.request_id) is None:
        raise InvalidRequestError("request_id is not 32 hexadecimal digits", param="request_id")
    for name in ("temperature", "top_p", "top_k", "seed", "max_tokens"):
        if not request.sampling.HasField(name):
            raise InvalidRequestError(f"sampling.{name} is unset; a started request has it resolved", param=name)
    if request.sampling.stop:
        raise InvalidRequestError("sampling.stop is set; stop strings are the gateway's", param="stop")
    sampling = sampling_of(request.sampling)
    check_sampling(sampling, limits)
    max_tokens = request.sampling.max_tokens
    num_generated = request.first_token_index
    if num_generated and (num_generated >= request.num_prompt_tokens or num_generated >= max_tokens):
        raise InvalidRequestError(
            f"first_token_index is {num_generated}; it must be below num_prompt_tokens ({request.num_prompt_tokens}) "
            f"and max_tokens ({max_tokens})",
            param="first_token_index",
        )
    _check_choice_index(request)
    check_prompt_scores(request.num_prompt_tokens, sampling)
    check_budget(request.num_prompt_tokens, max_tokens - num_generated, limits)
    check_prompt_part(request.token_ids, request.num_prompt_tokens, limits)
    if request.prefill_worker:
        check_name(request.prefill_worker, param="prefill_worker")
    if len(request.cache_salt) > MAX_SALT_BYTES:
        raise _outside("cache_salt", f"{len(request.cache_salt)} bytes long", f"at most {MAX_SALT_BYTES} bytes")


def check_prompt_part(token_ids: Sequence[int], num_missing: int, limits: Limits) -> None:
    """Checks one part of a prompt of which `num_missing` tokens have not arrived yet."""
    if len(token_ids) > num_missing:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids) - num_missing} more tokens than num_prompt_tokens says", param="token_ids"
        )
    check_token_ids(token_ids, limits, param="token_ids")


def as_float32(value: float) -> float:
    """`value` as the wire will carry it; infinite when it does not fit."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _check_penalties(sampling: Sampling) -> None:
    if sampling.repetition_penalty is not None:
        _check_real(sampling.repetition_penalty, "repetition_penalty")
        if not MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise _outside("repetition_penalty", sampling.repetition_penalty, "2^-20 to 2; 1 changes nothing")
    for name, value in (
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ):
        if value is not None:
            _check_real(value, name)
            if not -MAX_PENALTY <= value <= MAX_PENALTY:
                raise _outside(name, value, "-2 to 2; 0 changes nothing")


def _check_choice_index(request: decode_pb2.StartRequest) -> None:
    """Only a restart names a choice, and goes on with that one alone: a first start has all of them, from 0 on."""
    if request.first_token_index and request.sampling.n > 1:
        raise _outside("n", request.sampling.n, "1 where first_token_index is not 0: a restart goes on with one choice")
    if request.choice_index and not request.first_token_index:
        raise _outside("choice_index", request.choice_index, "0 where first_token_index is 0")
    if request.choice_index >= MAX_CHOICES:
        raise _outside("choice_index", request.choice_index, f"0 to {MAX_CHOICES - 1}")


def _check_stops(sampling: Sampling, limits: Limits) -> None:
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise _outside("stop", f"{len(sampling.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise _outside(
                "stop", f"a string of {len(stop)} characters", f"strings of 1 to {MAX_STOP_CHARS} characters"
            )
        check_unicode(stop, param="stop")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _outside("stop_token_ids", f"{len(sampling.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
    check_token_ids(sampling.stop_token_ids, limits, param="stop_token_ids")


def _check_real(value: float, param: str) -> None:
    if not math.isfinite(value):
        raise InvalidRequestError(f"{param} is {value}; send a finite number", param=param)


def _check_count(value: int | None, param: str, allowed: str, *, largest: int = _UINT32_MAX) -> None:
    if value is not None and not 0 <= value <= largest:
        raise _outside(param, value, allowed)


def _outside(param: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} is {value}; allowed: {allowed}", param=param)
