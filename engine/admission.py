"""Decides whether a request can ever be served here. Pure: values in, an error or nothing out."""

from engine.planning import EngineLimits
from engine.request import Request, RequestKind
from staffetta.errors import ContextLengthExceededError, InvalidRequestError

_MAX_TOKEN_ID = 2**32 - 1


def check_request(request: Request, limits: EngineLimits, *, block_size: int, num_blocks: int) -> None:
    """Raises InvalidRequestError, or ContextLengthExceededError, for a request that could never end well.

    The last generated token is never computed, so a request needs blocks for one token less than it has in the end.
    """
    sampling, prompt = request.sampling, request.prompt_token_ids
    if not prompt:
        raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
    if min(prompt) < 0 or max(prompt) > _MAX_TOKEN_ID:
        raise InvalidRequestError(f"token ids go from 0 to {_MAX_TOKEN_ID}", param="prompt")
    if sampling.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {sampling.max_tokens}: ask for at least 1", param="max_tokens")
    if sampling.min_tokens < 0:
        raise InvalidRequestError(f"min_tokens is {sampling.min_tokens}: 0 is the least", param="min_tokens")
    _check_choices(request, limits.max_requests)
    if not 0 <= request.first_token_index <= len(prompt):
        raise InvalidRequestError(
            f"first_token_index is {request.first_token_index} for a prompt of {len(prompt)} tokens",
            param="first_token_index",
        )
    num_new_tokens = sampling.max_tokens - request.first_token_index
    if num_new_tokens < 1:
        raise InvalidRequestError(
            f"max_tokens is {sampling.max_tokens} and {request.first_token_index} are generated: nothing is left to do",
            param="max_tokens",
        )
    if request.credit is not None and request.credit < 0:
        raise InvalidRequestError(f"credit is {request.credit}: 0 is the least", param="credit")
    # A prefill draws one token, however many its request asks for.
    num_drawn = 1 if request.kind is RequestKind.PREFILL else num_new_tokens
    _check_length(request, num_drawn, limits.max_model_len)
    num_computed = len(prompt) if request.kind is RequestKind.PREFILL else len(prompt) + num_new_tokens - 1
    num_needed = -(-num_computed // block_size)
    if num_needed > num_blocks:
        raise ContextLengthExceededError(
            f"the request needs {num_needed} KV blocks of {block_size} tokens and this worker has {num_blocks}: "
            "shorten the prompt, lower max_tokens, or give the worker more KV memory",
            param="prompt",
        )


def _check_choices(request: Request, max_requests: int) -> None:
    choices = request.choices
    if not choices or list(choices) != sorted(set(choices)) or choices[0] < 0:
        raise InvalidRequestError(f"choices are {choices}: name each once, rising, from 0 on", param="n")
    if request.num_places > max_requests:
        raise InvalidRequestError(
            f"{len(choices)} choices are asked for and this worker holds at most {max_requests}: lower n", param="n"
        )
    if request.first_token_index > 0 and len(choices) > 1:
        raise InvalidRequestError(
            f"{len(choices)} choices are asked for after {request.first_token_index} generated tokens: "
            "one choice alone can be restarted",
            param="first_token_index",
        )


def _check_length(request: Request, num_new_tokens: int, max_model_len: int) -> None:
    num_tokens = len(request.prompt_token_ids) + num_new_tokens
    if num_tokens > max_model_len:
        raise ContextLengthExceededError(
            f"this model's maximum context length is {max_model_len} tokens; the prompt has "
            f"{len(request.prompt_token_ids)} and up to {num_new_tokens} more are asked for: shorten the prompt or "
            f"lower max_tokens by {num_tokens - max_model_len}",
            param="prompt",
        )
