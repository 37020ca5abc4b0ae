"""Reads requests in OpenAI's shapes, chat and plain, with the extra parameters that servers of open models have.

What is known but not supported is refused by name; what is unknown is named in a response header. Nothing is dropped in
silence, and bounds are the validator's business.
"""

from dataclasses import dataclass, replace
from typing import Final

from gateway.fields import Fields
from gateway.request import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from gateway.template import Message
from staffetta.errors import InvalidRequestError, UnsupportedError
from staffetta.v1 import common_pb2
from staffetta.validate import Sampling

COMPLETION_MAX_TOKENS: Final = 16
"""What the completions endpoint generates where the request does not say."""

_POLICIES: Final = {
    "recompute": common_pb2.PREFILL_FAILURE_POLICY_RECOMPUTE,
    "fail": common_pb2.PREFILL_FAILURE_POLICY_FAIL,
}

_GRAMMAR: Final = "structured output is not implemented"
_TOOLS: Final = "tool calls are not implemented"
_TEMPLATE: Final = "only the model's own template is rendered"
_UNSUPPORTED: Final[dict[str, tuple[tuple[object, ...], str]]] = {
    "use_beam_search": ((False,), "choices are drawn, not searched for"),
    "logit_bias": (({},), "logits cannot be biased"),
    "min_p": ((0,), "use top_p or top_k"),
    "suffix": (("",), "text cannot be inserted before a suffix"),
    "response_format": (({"type": "text"},), _GRAMMAR),
    "structured_outputs": (({},), _GRAMMAR),
    "guided_json": ((), _GRAMMAR),
    "guided_regex": ((), _GRAMMAR),
    "guided_choice": ((), _GRAMMAR),
    "guided_grammar": ((), _GRAMMAR),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "chat_template": ((), _TEMPLATE),
    "chat_template_kwargs": (({},), _TEMPLATE),
    "add_generation_prompt": ((True,), _TEMPLATE),
    "continue_final_message": ((False,), _TEMPLATE),
    "modalities": ((["text"],), "only text is generated"),
    "audio": ((), "only text is generated"),
    "prediction": ((), "predicted outputs are not implemented"),
    "cache_salt": (("",), "prefixes are shared by all clients of this server"),
    "priority": ((0,), "all requests have the same priority"),
    "return_progress": ((False,), "progress of the prefill is not reported"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """One request and how its answer is to look. `ignored` names the fields that have no effect.

    `has_echo`: the output begins with the prompt. `has_output` False: it ends there, too; one token is drawn, since
    that is how a request ends, and not shown. `num_prompt_logprobs` is what was asked for by that name; `sampling` may
    ask for more, for `has_echo`.
    """

    model: str
    prompt: Prompt
    sampling: Sampling
    default_max_tokens: int | None
    on_prefill_failure: common_pb2.PrefillFailurePolicy.ValueType
    is_stream: bool
    has_usage_chunk: bool
    has_token_ids: bool
    num_prompt_logprobs: int | None
    has_echo: bool = False
    has_output: bool = True
    ignored: tuple[str, ...]


def parse_chat(body: dict[str, object]) -> ParsedRequest:
    """A request to /v1/chat/completions. Raises InvalidRequestError."""
    fields = Fields(body)
    messages = tuple(_message(message) for message in fields.sections("messages"))
    longer, shorter = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
    if longer is not None and shorter is not None and longer != shorter:
        raise InvalidRequestError(
            f"max_tokens is {longer} and max_completion_tokens is {shorter}; send one of them", param="max_tokens"
        )
    has_logprobs, num_top = fields.boolean("logprobs"), fields.integer("top_logprobs")
    if num_top is not None and not has_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true; add it", param="top_logprobs")
    fields.only("echo", (False,), why="a chat's prompt is not sent back")
    return _parse(
        fields,
        prompt=ChatPrompt(messages),
        default_max_tokens=None,
        max_tokens=shorter if longer is None else longer,
        num_logprobs=(num_top or 0) if has_logprobs else None,
    )


def parse_completion(body: dict[str, object]) -> ParsedRequest:
    """A request to /v1/completions. Raises InvalidRequestError."""
    fields = Fields(body)
    has_echo = fields.boolean("echo") or False
    max_tokens, num_logprobs = fields.integer("max_tokens"), fields.integer("logprobs")
    has_output = not has_echo or max_tokens != 0
    parsed = _parse(
        fields,
        prompt=_prompt(fields),
        default_max_tokens=COMPLETION_MAX_TOKENS,
        max_tokens=max_tokens if has_output else 1,
        num_logprobs=num_logprobs,
    )
    if not has_echo:
        return parsed
    sampling, num_scored = parsed.sampling, parsed.num_prompt_logprobs
    # What echo shows beside its tokens comes of the prompt's log-probabilities; the larger wish has the smaller in it.
    if num_logprobs is not None and (num_scored is None or 0 <= num_scored < num_logprobs):
        sampling = replace(sampling, prompt_logprobs=num_logprobs)
    return replace(parsed, sampling=sampling, has_echo=True, has_output=has_output)


def _parse(
    fields: Fields, *, prompt: Prompt, default_max_tokens: int | None, max_tokens: int | None, num_logprobs: int | None
) -> ParsedRequest:
    num_choices, num_prompt_logprobs = fields.integer("n"), fields.integer("prompt_logprobs")
    fields.only("best_of", (1 if num_choices is None else num_choices,), why="every choice is returned; use n")
    sampling = Sampling(
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        top_k=fields.integer("top_k"),
        seed=fields.integer("seed"),
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens"),
        stop_token_ids=fields.integers("stop_token_ids"),
        stop=fields.strings("stop"),
        ignore_eos=fields.boolean("ignore_eos"),
        logprobs=num_logprobs,
        n=num_choices,
        repetition_penalty=fields.number("repetition_penalty"),
        presence_penalty=fields.number("presence_penalty"),
        frequency_penalty=fields.number("frequency_penalty"),
        prompt_logprobs=num_prompt_logprobs,
    )
    model = fields.text("model") or ""
    is_stream = fields.boolean("stream") or False
    options = fields.section("stream_options")
    if options is not None and not is_stream:
        raise InvalidRequestError("stream_options needs stream to be true; add it", param="stream_options")
    if num_prompt_logprobs is not None and is_stream:
        raise InvalidRequestError(
            "prompt_logprobs come in an answer of one piece; set stream to false", param="prompt_logprobs"
        )
    has_usage_chunk = options is not None and (options.boolean("include_usage") or False)
    has_token_ids = fields.boolean("return_token_ids") or False
    policy = fields.text("on_prefill_failure")
    if policy is not None and policy not in _POLICIES:
        fields.refuse("on_prefill_failure", " or ".join(map(repr, _POLICIES)))
    for name, (neutral, why) in _UNSUPPORTED.items():
        fields.only(name, neutral, why=why)
    return ParsedRequest(
        model=model,
        prompt=prompt,
        sampling=sampling,
        default_max_tokens=default_max_tokens,
        on_prefill_failure=_POLICIES.get(policy or "", common_pb2.PREFILL_FAILURE_POLICY_UNSPECIFIED),
        is_stream=is_stream,
        has_usage_chunk=has_usage_chunk,
        has_token_ids=has_token_ids,
        num_prompt_logprobs=num_prompt_logprobs,
        ignored=fields.ignored(),
    )


def _message(fields: Fields) -> Message:
    """One message; its content is a string or a list of text parts, which are joined by line ends."""
    role = fields.text("role")
    if role is None:
        fields.refuse("role", "'system', 'user' or 'assistant'")
    fields.only("tool_calls", ([],), why=_TOOLS)
    content = fields.raw("content")
    if isinstance(content, list):
        content = "\n".join(map(_text_part, fields.sections("content")))
    if not isinstance(content, str):
        fields.refuse("content", "a string")
    # The newer name of the same role.
    return Message("system" if role == "developer" else role, content)


def _text_part(fields: Fields) -> str:
    kind = fields.text("type")
    if kind != "text":
        raise UnsupportedError("a content part is not text; this model reads text only", param="messages")
    text = fields.text("text")
    return fields.refuse("text", "a string") if text is None else text


def _prompt(fields: Fields) -> Prompt:
    """A string, a list of token ids, or a list that holds just one of either."""
    value = fields.raw("prompt")
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise UnsupportedError(
                f"prompt is a list of {len(value)} prompts; send one request for each", param="prompt"
            )
        value = value[0]
    if isinstance(value, str):
        return TextPrompt(value)
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return TokenPrompt(tuple(value))
    return fields.refuse("prompt", "a string or a list of token ids")
