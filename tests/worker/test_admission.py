"""A prompt in parts, and what a prefill worker refuses to begin."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from staffetta.errors import ContextLengthExceededError, InvalidRequestError
from staffetta.v1 import common_pb2, prefill_pb2
from staffetta.validate import Limits
from worker.admission import PromptParts, check_prefill

LIMITS = Limits(vocab_size=100, max_model_len=64)


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=8))
def test_the_parts_make_the_prompt_in_order(parts: list[list[int]]) -> None:
    whole = [token_id for part in parts for token_id in part]
    gathered = PromptParts(len(whole), parts[0], LIMITS)
    for number, part in enumerate(parts[1:], start=1):
        assert gathered.is_complete is (sum(map(len, parts[:number])) == len(whole))
        gathered.append(part)
    assert gathered.is_complete
    assert gathered.take() == tuple(whole)
    assert gathered.take() == ()


@pytest.mark.parametrize(("part", "told"), [([1, 2, 3], "the prompt has 1 more tokens than"), ([100], "token id 100")])
def test_a_part_that_does_not_belong_is_refused_and_adds_nothing(part: list[int], told: str) -> None:
    parts = PromptParts(3, [7], LIMITS)
    with pytest.raises(InvalidRequestError, match=told):
        parts.append(part)
    assert not parts.is_complete
    parts.append([8, 9])
    assert parts.take() == (7, 8, 9)


def test_a_first_part_is_checked_like_any_other() -> None:
    with pytest.raises(InvalidRequestError, match="2 more tokens"):
        PromptParts(1, [1, 2, 3], LIMITS)


def make_sampling(**changes: Any) -> common_pb2.SamplingParams:
    values: dict[str, Any] = {"temperature": 0, "top_p": 1, "top_k": 0, "seed": 0, "max_tokens": 4}
    return common_pb2.SamplingParams(**values | changes)


def make_start(**changes: Any) -> prefill_pb2.StartPrefill:
    sampling = make_sampling()
    values: dict[str, Any] = {
        "handoff_id": "0f" * 16,
        "num_prompt_tokens": 40,
        "token_ids": [1] * 40,
        "sampling": sampling,
    }
    return prefill_pb2.StartPrefill(**values | {"lease_s": 1.0} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_held_tokens": 32},
        {"lease_s": 600.0},
        {"token_ids": []},
        {"sampling": make_sampling(n=16, repetition_penalty=2.0, presence_penalty=-2.0, prompt_logprobs=20)},
        {"first_token_index": 3, "choice_index": 15},
        {"sampling": make_sampling(max_tokens=1000, n=16)},  # the rest of them needs room elsewhere
    ],
)
def test_a_proper_start_passes(changes: dict[str, Any]) -> None:
    check_prefill(make_start(**changes), LIMITS, block_size=16)


def test_a_prompt_that_is_held_whole_passes() -> None:
    check_prefill(make_start(num_prompt_tokens=32, token_ids=[1] * 32, num_held_tokens=32), LIMITS, block_size=16)


REFUSED = [
    ({"handoff_id": ""}, InvalidRequestError, "request_id is not 32 hexadecimal digits"),
    ({"handoff_id": "0F" * 16}, InvalidRequestError, "request_id is not 32 hexadecimal digits"),
    ({"num_prompt_tokens": 0, "token_ids": []}, InvalidRequestError, "has no tokens"),
    ({"num_prompt_tokens": 64}, ContextLengthExceededError, "maximum context length is 64 tokens"),
    ({"token_ids": [1] * 41}, InvalidRequestError, "1 more tokens"),
    ({"token_ids": [100]}, InvalidRequestError, "token id 100"),
    ({"cache_salt": bytes(65)}, InvalidRequestError, "cache_salt is 65 bytes long"),
    ({"first_token_index": 4}, InvalidRequestError, "first_token_index is 4"),
    ({"sampling": common_pb2.SamplingParams(max_tokens=4)}, InvalidRequestError, "sampling.temperature is unset"),
    ({"sampling": make_sampling(n=17)}, InvalidRequestError, "n is 17; allowed: 1 to 16"),
    ({"sampling": make_sampling(n=0)}, InvalidRequestError, "n is 0; allowed: 1 to 16"),
    (
        {"sampling": make_sampling(n=3), "first_token_index": 2, "choice_index": 2},
        InvalidRequestError,
        "n is 3; allowed: 1 where first_token_index is not 0: a restart goes on with one choice",
    ),
    ({"choice_index": 1}, InvalidRequestError, "choice_index is 1; allowed: 0 where first_token_index is 0"),
    ({"first_token_index": 2, "choice_index": 16}, InvalidRequestError, "choice_index is 16; allowed: 0 to 15"),
    ({"sampling": make_sampling(repetition_penalty=0.0)}, InvalidRequestError, "repetition_penalty is 0.0"),
    ({"sampling": make_sampling(presence_penalty=2.5)}, InvalidRequestError, "presence_penalty is 2.5"),
    ({"sampling": make_sampling(frequency_penalty=float("nan"))}, InvalidRequestError, "frequency_penalty is nan"),
    ({"sampling": make_sampling(prompt_logprobs=21)}, InvalidRequestError, "prompt_logprobs is 21"),
    (
        {"num_held_tokens": 17},
        InvalidRequestError,
        "num_held_tokens is 17; it must be a multiple of the block size, 16",
    ),
    ({"num_held_tokens": 48}, InvalidRequestError, "at most num_prompt_tokens, 40"),
    ({"lease_s": 0.0}, InvalidRequestError, "lease_s is 0; it must be above 0 and at most 600"),
    ({"lease_s": -1.0}, InvalidRequestError, "lease_s is -1"),
    ({"lease_s": 600.5}, InvalidRequestError, "lease_s is 600.5"),
    ({"lease_s": float("inf")}, InvalidRequestError, "lease_s is inf"),
    ({"lease_s": float("nan")}, InvalidRequestError, "lease_s is nan"),
]


@pytest.mark.parametrize(("changes", "error", "told"), REFUSED, ids=[told for _, _, told in REFUSED])
def test_a_start_that_cannot_be_right_is_refused(
    changes: dict[str, Any], error: type[InvalidRequestError], told: str
) -> None:
    with pytest.raises(error, match=re.escape(told)):
        check_prefill(make_start(**changes), LIMITS, block_size=16)
