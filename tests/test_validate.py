"""The request validator: every bound from both sides, and what its refusals say."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from staffetta import validate
from staffetta.errors import ContextLengthExceededError, InvalidRequestError
from staffetta.v1 import common_pb2, decode_pb2
from staffetta.validate import Limits, Sampling

LIMITS = Limits(vocab_size=100, max_model_len=64)


def make_start(**changes: object) -> decode_pb2.StartRequest:
    """A request that a worker accepts, but for `changes`."""
    start = decode_pb2.StartRequest(
        request_id="0123456789abcdef" * 2,
        num_prompt_tokens=3,
        token_ids=[1, 2, 3],
        sampling=common_pb2.SamplingParams(temperature=1, top_p=1, top_k=0, seed=7, max_tokens=8, min_tokens=0),
        credit=16,
    )
    for name, value in changes.items():
        target: object = start.sampling if hasattr(start.sampling, name) else start
        if isinstance(value, list):
            getattr(target, name)[:] = value
        elif value is None:
            start.sampling.ClearField(name)  # type: ignore[arg-type]
        else:
            setattr(target, name, value)
    return start


@pytest.mark.parametrize("client_id", ["", "job:42 <a>", "~" * 128])
def test_a_clients_id_may_be_anything_that_prints(client_id: str) -> None:
    validate.check_client_id(client_id, param="request_id")


@pytest.mark.parametrize("client_id", ["~" * 129, "a\n", "a\x7f", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\x1b[2J"])
def test_a_clients_id_that_is_long_or_does_not_print_is_refused_by_name(client_id: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^request_id is not up to 128") as refused:
        validate.check_client_id(client_id, param="request_id")
    assert refused.value.param == "request_id"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", (0.0, 1.0, 2.0), (-0.001, 2.001, math.nan, math.inf, -math.inf)),
        ("top_p", (0.001, 1.0), (0.0, -0.1, 1.0001, math.nan, 1e-60)),
        ("top_k", (0, 1, 2**32 - 1), (-1, 2**32)),
        ("seed", (0, 2**63, 2**64 - 1), (-1, 2**64)),
        ("max_tokens", (1, 2**32 - 1), (0, -1, 2**32)),
        ("min_tokens", (0, 5), (-1, 2**32)),
        ("logprobs", (0, 20), (-1, 21)),
        ("prompt_logprobs", (0, 20), (-1, 21)),
        ("n", (1, 16), (0, -1, 17, 2**32)),
        ("repetition_penalty", (1e-6, 1.0, 2.0), (0.0, -1.0, 2.001, 9e-7, math.nan, math.inf)),
        ("presence_penalty", (-2.0, 0.0, 2.0), (-2.001, 2.001, math.nan, -math.inf)),
        ("frequency_penalty", (-2.0, 0.0, 2.0), (-2.001, 2.001, math.nan, math.inf)),
        ("stop_token_ids", ((), (0, 99), (1,) * 64), ((100,), (-1,), (1,) * 65)),
        ("stop", ((), ("a",) * 16, ("x" * 256,)), (("",), ("a",) * 17, ("x" * 257,), ("\ud800",))),
    ],
)
def test_each_value_passes_up_to_its_bound_and_is_refused_by_name_beyond_it(
    name: str, good: tuple[object, ...], bad: tuple[object, ...]
) -> None:
    for value in good:
        validate.check_sampling(replace(Sampling(), **{name: value}), LIMITS)  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(InvalidRequestError) as refusal:
            validate.check_sampling(replace(Sampling(), **{name: value}), LIMITS)  # type: ignore[arg-type]
        assert refusal.value.param == name
        assert name in refusal.value.message


def test_a_refusal_states_the_value_and_what_is_allowed() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        validate.check_sampling(Sampling(temperature=3.5), LIMITS)
    assert refusal.value.message == "temperature is 3.5; allowed: 0 to 2; 0 is greedy"


def test_a_request_that_does_not_say_has_one_choice() -> None:
    assert validate.num_choices(Sampling()) == 1
    assert validate.num_choices(Sampling(n=16)) == 16
    with pytest.raises(InvalidRequestError, match=r"^n is 17; allowed: 1 to 16$"):
        validate.num_choices(Sampling(n=17))


def test_min_tokens_may_equal_max_tokens_but_not_exceed_it() -> None:
    validate.check_sampling(Sampling(min_tokens=4, max_tokens=4), LIMITS)
    with pytest.raises(InvalidRequestError, match="min_tokens is 5, above max_tokens, which is 4"):
        validate.check_sampling(Sampling(min_tokens=5, max_tokens=4), LIMITS)


def test_prompt_and_answer_may_fill_the_context_exactly() -> None:
    validate.check_budget(56, 8, LIMITS)
    with pytest.raises(ContextLengthExceededError) as refusal:
        validate.check_budget(57, 8, LIMITS)
    assert refusal.value.message.startswith("This model's maximum context length is 64 tokens. The request has 57 in")
    assert "together 65" in refusal.value.message


def test_a_prompt_without_max_tokens_must_leave_room_for_one_token() -> None:
    validate.check_budget(63, None, LIMITS)
    with pytest.raises(ContextLengthExceededError, match="at least 1 more"):
        validate.check_budget(64, None, LIMITS)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="prompt has no tokens"):
        validate.check_budget(0, 1, LIMITS)
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        validate.check_text("")


def test_a_token_id_outside_the_vocabulary_is_named() -> None:
    validate.check_token_ids([0, 99], LIMITS)
    validate.check_token_ids([], LIMITS)
    with pytest.raises(InvalidRequestError, match="prompt holds token id 100; the vocabulary has ids 0 to 99"):
        validate.check_token_ids([1, 100, 500], LIMITS)


def test_half_a_surrogate_pair_is_refused_and_a_whole_character_passes() -> None:
    validate.check_text("\N{GRINNING FACE}")
    with pytest.raises(InvalidRequestError, match="half a surrogate pair"):
        validate.check_text("\ud83d")


def test_overlong_texts_are_refused_before_anyone_tokenizes_them() -> None:
    with pytest.raises(InvalidRequestError, match="the limit is 4194304"):
        validate.check_text("x" * (validate.MAX_TEXT_CHARS + 1))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([("user", "hi")] * 4097, "messages"),
        ([("user", "hi"), ("root", "hi")], "messages[1].role"),
        ([("user", "\udc00")], "messages[0].content"),
        ([("user", "x" * 2**21)] * 3, "messages"),
    ],
)
def test_a_chat_is_bounded_in_number_roles_and_size(messages: list[tuple[str, str]], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        validate.check_chat(messages)
    assert refusal.value.param == param


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a" * 65, "a b", "é", "a\n"])
def test_names_outside_the_alphabet_are_refused(name: str) -> None:
    validate.check_name("Demo-1.5_b", param="model")
    with pytest.raises(InvalidRequestError, match="is not a name"):
        validate.check_name(name, param="model")


def test_a_worker_accepts_a_resolved_request() -> None:
    validate.check_start(make_start(), LIMITS)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"request_id": "ABC"}, "request_id"),
        ({"request_id": "g" * 32}, "request_id"),
        ({"seed": None}, "seed"),
        ({"temperature": None}, "temperature"),
        ({"top_p": None}, "top_p"),
        ({"top_k": None}, "top_k"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": math.nan}, "temperature"),
        ({"stop": ["x"]}, "stop"),
        ({"num_prompt_tokens": 0, "token_ids": []}, "prompt"),
        ({"num_prompt_tokens": 57}, "prompt"),
        ({"num_prompt_tokens": 2**32 - 1}, "prompt"),
        ({"max_tokens": 62}, "prompt"),
        ({"token_ids": [1, 2, 3, 4]}, "token_ids"),
        ({"token_ids": [1, 100]}, "token_ids"),
        ({"first_token_index": 3}, "first_token_index"),
        ({"first_token_index": 8, "num_prompt_tokens": 20}, "first_token_index"),
        ({"prefill_worker": "../x"}, "prefill_worker"),
        ({"cache_salt": b"x" * 65}, "cache_salt"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"n": 17}, "n"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"choice_index": 1}, "choice_index"),
        ({"choice_index": 16, "first_token_index": 2}, "choice_index"),
    ],
)
def test_a_worker_refuses_what_a_gateway_should_not_have_sent(changes: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        validate.check_start(make_start(**changes), LIMITS)
    assert refusal.value.param == param


def test_a_resumed_request_counts_what_it_generated_before_only_once() -> None:
    validate.check_start(make_start(num_prompt_tokens=60, first_token_index=4, max_tokens=8), LIMITS)
    with pytest.raises(ContextLengthExceededError):
        validate.check_start(make_start(num_prompt_tokens=61, first_token_index=4, max_tokens=8), LIMITS)


def test_a_resumed_request_may_be_any_choice() -> None:
    validate.check_start(make_start(first_token_index=2, choice_index=15), LIMITS)


def test_a_part_of_a_prompt_may_not_bring_more_than_is_missing() -> None:
    validate.check_prompt_part([1, 2], 2, LIMITS)
    with pytest.raises(InvalidRequestError, match="1 more tokens than num_prompt_tokens says"):
        validate.check_prompt_part([1, 2, 3], 2, LIMITS)


def test_unset_fields_of_the_wire_stay_unset() -> None:
    assert validate.sampling_of(common_pb2.SamplingParams()) == Sampling()
    zeros: dict[str, Any] = dict.fromkeys(
        ("temperature", "top_k", "seed", "min_tokens", "logprobs", "ignore_eos", "n", "prompt_logprobs"), 0
    ) | dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), 0.0)
    assert validate.sampling_of(common_pb2.SamplingParams(**zeros)) == Sampling(**zeros)


@given(st.binary(max_size=200))
def test_arbitrary_messages_are_accepted_or_refused_and_nothing_else(data: bytes) -> None:
    start = decode_pb2.StartRequest()
    try:
        start.MergeFromString(data)
    except Exception:  # noqa: BLE001 - the parser's own refusal is not what is tested
        return
    try:
        validate.check_start(start, LIMITS)
    except InvalidRequestError as refusal:
        assert refusal.message


def test_a_prompt_is_scored_when_the_answer_can_hold_the_scores_of_every_choice() -> None:
    most = validate.MAX_PROMPT_SCORES // (4 * 8)
    validate.check_prompt_scores(most, Sampling(n=4, prompt_logprobs=7))
    validate.check_prompt_scores(10 * most, Sampling(n=16))
    with pytest.raises(
        InvalidRequestError, match=r"8193 prompt tokens .* 262176 log-probabilities, the limit is 262144"
    ):
        validate.check_prompt_scores(most + 1, Sampling(n=4, prompt_logprobs=7))


def test_a_worker_refuses_too_many_scores_too() -> None:
    start = make_start(prompt_logprobs=20, n=16, num_prompt_tokens=1000, max_tokens=1)
    with pytest.raises(InvalidRequestError, match="336000 log-probabilities"):
        validate.check_start(start, Limits(vocab_size=100, max_model_len=2000))
