"""From a request as a door read it to one that a worker can start: checked, tokenized, every default resolved, hashed.

Pure but for the drawing of a seed; runs in the journey's thread pool, never on the event loop.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from gateway.model import Model
from gateway.request import ChatPrompt, JourneyRequest, Prompt, TextPrompt, TokenPrompt
from staffetta import validate
from staffetta.errors import InvalidRequestError, UnknownModelError, UnsupportedError
from staffetta.hashing import BlockHasher, short_hash
from staffetta.v1 import common_pb2
from staffetta.validate import Limits, Sampling

SEED_BITS = 63
MAX_DETOKENIZED_CONTEXTS = 4
"""Token ids that are turned into text at once, in lengths of the model's context: no output is longer than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that can be started once `sampling_within` a worker's context is known.

    `sampling` has every default resolved but that of max_tokens, for which `default_max_tokens` is the most, None
    meaning all that the context leaves. `prompt_param` names the field that the prompt came in. `stop_token_ids` are
    all ids that end it and have no text; `stop` are its strings. `hashes` is empty for a request that takes no prefix
    hits, because its answer needs every position of the prompt computed.
    """

    token_ids: Sequence[int]
    prompt_param: str
    sampling: common_pb2.SamplingParams
    default_max_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    hashes: Mapping[int, Sequence[int]]


def prepare(
    request: JourneyRequest, model: Model, *, max_model_len: int, cluster_key: bytes, block_sizes: Collection[int]
) -> Prepared:
    """Checks and resolves `request`. Raises UnknownModelError, InvalidRequestError or one of its kinds."""
    check_model(request.model, model)
    limits = Limits(model.limits.vocab_size, min(model.limits.max_model_len, max_model_len))
    # The cheap checks first: a request with a bad temperature is not worth tokenizing.
    validate.check_sampling(request.sampling, limits)
    token_ids = tokenize(request.prompt, model)
    field = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
    # Before the hashing of a prompt that fits nobody.
    validate.check_budget(len(token_ids), request.sampling.max_tokens, limits, param=field)
    sampling = _resolve(request.sampling, model)
    stop_token_ids = frozenset(sampling.stop_token_ids)
    prepared = Prepared(
        token_ids=token_ids,
        prompt_param=field,
        sampling=_to_wire(sampling),
        default_max_tokens=request.default_max_tokens,
        stop=sampling.stop,
        stop_token_ids=stop_token_ids if sampling.ignore_eos else stop_token_ids | model.eos_token_ids,
        hashes={
            size: [short_hash(block) for block in BlockHasher(cluster_key, block_size=size).chain(token_ids)]
            for size in (block_sizes if sampling.prompt_logprobs is None else ())
        },
    )
    sampling_within(prepared, limits)
    return prepared


def sampling_within(prepared: Prepared, limits: Limits) -> common_pb2.SamplingParams:
    """The sampling that workers of these `limits` are sent, with max_tokens resolved.

    Raises ContextLengthExceededError, or InvalidRequestError, when the request does not fit them.
    """
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(prepared.sampling)
    asked = sampling.max_tokens if sampling.HasField("max_tokens") else None
    validate.check_budget(len(prepared.token_ids), asked, limits, param=prepared.prompt_param)
    if asked is None:
        num_left = limits.max_model_len - len(prepared.token_ids)
        sampling.max_tokens = min(num_left, prepared.default_max_tokens or num_left)
    resolved = validate.sampling_of(sampling)
    validate.check_sampling(resolved, limits)
    validate.check_prompt_scores(len(prepared.token_ids), resolved)
    return sampling


def check_model(name: str, model: Model) -> None:
    """Refuses any name but the served model's; empty means that one."""
    if name and name != model.name:
        raise UnknownModelError(
            f"the model {name[:64]!r} does not exist; this server has {model.name!r}", param="model"
        )


def tokenize(prompt: Prompt, model: Model) -> Sequence[int]:
    """The prompt's token ids, each in the vocabulary."""
    match prompt:
        case TextPrompt(text):
            validate.check_text(text)
            return model.text.encode(text)
        case ChatPrompt(messages):
            validate.check_chat(messages)
            if not model.text.has_chat:
                raise UnsupportedError(
                    f"the model {model.name!r} has no chat template; use the completions endpoint or a text prompt",
                    param="messages",
                )
            return model.text.encode_chat(messages)
        case TokenPrompt(token_ids):
            validate.check_token_ids(token_ids, model.limits)
            return token_ids
        case other:
            assert_never(other)


def detokenize(token_ids: Sequence[int], model: Model) -> str:
    """The text of token ids. Raises InvalidRequestError for too many, and for one that the vocabulary lacks."""
    most = MAX_DETOKENIZED_CONTEXTS * model.limits.max_model_len
    if len(token_ids) > most:
        raise InvalidRequestError(
            f"token_ids has {len(token_ids)} entries, the limit is {most}; send them in parts", param="token_ids"
        )
    validate.check_token_ids(token_ids, model.limits, param="token_ids")
    return model.text.decode(token_ids)


def _resolve(asked: Sampling, model: Model) -> Sampling:
    defaults = model.defaults
    return replace(
        asked,
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_p=defaults.top_p if asked.top_p is None else asked.top_p,
        top_k=defaults.top_k if asked.top_k is None else asked.top_k,
        seed=secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed,
        min_tokens=asked.min_tokens or 0,
        ignore_eos=asked.ignore_eos or False,
        n=validate.num_choices(asked),
        repetition_penalty=(
            defaults.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty
        ),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
    )


def _to_wire(sampling: Sampling) -> common_pb2.SamplingParams:
    """The message for the worker; stop strings stay here, where the text is."""
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        n=sampling.n,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        prompt_logprobs=sampling.prompt_logprobs,
    )
