"""Gathers a prompt that arrives in parts and checks it with the one validator before anything reaches the engine."""

from collections.abc import Sequence

from staffetta import validate
from staffetta.config.schema import MAX_LEASE_S
from staffetta.errors import InvalidRequestError, QueueFullError
from staffetta.v1 import common_pb2, decode_pb2, prefill_pb2


class PromptParts:
    """Token ids of one prompt, gathered until `num_prompt_tokens` have come. Event loop only."""

    def __init__(self, num_prompt_tokens: int, first: Sequence[int], limits: validate.Limits) -> None:
        self._num_missing = num_prompt_tokens
        self._limits = limits
        self._token_ids: list[int] = []
        self.append(first)

    def append(self, token_ids: Sequence[int]) -> None:
        """Adds the next part. Raises InvalidRequestError for an id outside the vocabulary or more than announced."""
        validate.check_prompt_part(token_ids, self._num_missing, self._limits)
        self._num_missing -= len(token_ids)
        self._token_ids.extend(token_ids)

    @property
    def is_complete(self) -> bool:
        """Whether every announced token is here."""
        return self._num_missing == 0

    def take(self) -> tuple[int, ...]:
        """The whole prompt; this object keeps nothing of it."""
        token_ids = tuple(self._token_ids)
        self._token_ids = []
        return token_ids


def check_room(num_asked: int, num_held: int, max_requests: int) -> None:
    """Checks that `num_held` choices, the `num_asked` of a new request included, are no more than a worker may hold.

    Raises InvalidRequestError for a request that would have no room in an empty worker either, else QueueFullError.
    """
    if num_asked > max_requests:
        raise InvalidRequestError(
            f"n is {num_asked} and this worker holds at most {max_requests} choices; lower it", param="n"
        )
    if num_held > max_requests:
        raise QueueFullError(f"{num_held} choices would be held here, {max_requests} may be; retry later")


def check_prefill(start: prefill_pb2.StartPrefill, limits: validate.Limits, *, block_size: int) -> None:
    """Checks what a decode worker asks of a prefill worker, by the same rules that the gateway's request passed."""
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(start.sampling)
    # One token of each choice is drawn here, whatever is asked for: the rest needs room on the decode worker alone.
    sampling.max_tokens = min(sampling.max_tokens, start.first_token_index + 1)
    sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)
    validate.check_start(
        decode_pb2.StartRequest(
            request_id=start.handoff_id,
            num_prompt_tokens=start.num_prompt_tokens,
            token_ids=start.token_ids,
            sampling=sampling,
            cache_salt=start.cache_salt,
            first_token_index=start.first_token_index,
            choice_index=start.choice_index,
        ),
        limits,
    )
    if start.num_held_tokens % block_size or start.num_held_tokens > start.num_prompt_tokens:
        raise InvalidRequestError(
            f"num_held_tokens is {start.num_held_tokens}; it must be a multiple of the block size, {block_size}, "
            f"and at most num_prompt_tokens, {start.num_prompt_tokens}"
        )
    if not 0.0 < start.lease_s <= MAX_LEASE_S:
        raise InvalidRequestError(f"lease_s is {start.lease_s:g}; it must be above 0 and at most {MAX_LEASE_S:g}")
