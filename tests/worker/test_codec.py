"""What crosses the wire comes back as it was."""

import math
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from engine.request import FinishReason, PromptToken, SampledToken
from kvtransfer.layout import BlockId, KVGroup, KVLayout
from kvtransfer.manifest import BlockEntry
from kvtransfer.transport import TransportOffer
from prefill_svc.handoff import EVENTS_PER_MESSAGE
from staffetta.rpc import session
from staffetta.rpc.options import MAX_MESSAGE_BYTES
from staffetta.v1 import common_pb2, decode_pb2, prefill_pb2
from staffetta.validate import MAX_CHOICES, MAX_LOGPROBS
from worker import codec

M = TypeVar("M", bound=Message)

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
float32 = st.floats(width=32, allow_nan=False)


def over_the_wire(message: M) -> M:
    return type(message).FromString(message.SerializeToString())


@given(uint32, uint32, st.none() | float32, st.lists(st.tuples(uint32, float32), max_size=20))
def test_a_token_comes_back_as_it_was(
    index: int, token_id: int, logprob: float | None, alternatives: list[tuple[int, float]]
) -> None:
    token = SampledToken(index, token_id, logprob, tuple(alternatives))
    assert codec.token_from_proto(over_the_wire(codec.token_to_proto(token))) == token


def test_a_log_probability_of_zero_is_not_an_absent_one() -> None:
    token = SampledToken(0, 0, 0.0)
    assert codec.token_from_proto(over_the_wire(codec.token_to_proto(token))).logprob == 0.0
    assert codec.token_from_proto(over_the_wire(codec.token_to_proto(SampledToken(0, 0)))).logprob is None


@given(uint32, uint32, uint32, uint64, st.sampled_from([b"", bytes(16), b"\xff" * 16]), st.lists(uint64, max_size=9))
def test_a_block_entry_comes_back_as_it_was(
    block_id: int, index: int, num_tokens: int, generation: int, chain_hash: bytes, checksums: list[int]
) -> None:
    entry = BlockEntry(BlockId(block_id), index, num_tokens, generation, chain_hash, tuple(checksums))
    assert codec.entry_from_proto(over_the_wire(codec.entry_to_proto(entry))) == entry


@given(st.sampled_from(["shm", "tcp", "loopback"]), st.text(max_size=100), st.binary(max_size=64), uint32)
def test_an_offer_comes_back_as_it_was(transport: str, endpoint: str, key: bytes, num_blocks: int) -> None:
    offer = TransportOffer(transport, endpoint, key, num_blocks)
    assert codec.offer_from_proto(over_the_wire(codec.offer_to_proto(offer))) == offer


@pytest.mark.parametrize("reason", FinishReason)
def test_a_finish_reason_has_its_own_name_on_the_wire(reason: FinishReason) -> None:
    number = codec.finish_reason_to_proto(reason)
    assert common_pb2.FinishReason.Name(number) == f"FINISH_REASON_{reason.name}"


def test_a_sequence_that_goes_on_has_no_finish_reason() -> None:
    assert codec.finish_reason_to_proto(None) == common_pb2.FINISH_REASON_UNSPECIFIED


def test_every_field_of_a_layout_is_announced() -> None:
    group = KVGroup(kind="full", num_layers=3, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
    layout = KVLayout("digest", (group,))
    assert codec.layout_to_proto(layout) == common_pb2.KVLayout(
        layout_id=layout.layout_id,
        groups=[
            common_pb2.KVGroup(kind="full", num_layers=3, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
        ],
    )


SAMPLING = common_pb2.SamplingParams(
    temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1, max_tokens=9, min_tokens=2, stop_token_ids=[5, 6], logprobs=0
)


def test_sampling_parameters_reach_the_engine_one_by_one() -> None:
    sampling = codec.sampling_from_proto(over_the_wire(SAMPLING), eos_token_ids=(1, 2))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.25, 7, 2**64 - 1)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.num_logprobs) == (9, 2, 0)
    assert sampling.stop_token_ids == {1, 2, 5, 6}


def test_a_temperature_of_0_has_no_sign() -> None:
    sampling = codec.sampling_from_proto(common_pb2.SamplingParams(temperature=-0.0), eos_token_ids=())
    assert math.copysign(1.0, sampling.temperature) == 1.0


def test_ignored_ends_of_sequence_leave_the_stop_tokens_asked_for() -> None:
    params = common_pb2.SamplingParams()
    params.CopyFrom(SAMPLING)
    params.ignore_eos = True
    params.ClearField("logprobs")
    sampling = codec.sampling_from_proto(params, eos_token_ids=(1, 2))
    assert sampling.stop_token_ids == {5, 6}
    assert sampling.num_logprobs is None


def test_the_largest_part_of_a_prompt_fits_a_message() -> None:
    part = [2**32 - 1] * session.TOKEN_IDS_PER_MESSAGE
    stops = common_pb2.SamplingParams(stop_token_ids=[2**32 - 1] * 64)
    start = prefill_pb2.StartPrefill(token_ids=part, sampling=stops, cache_salt=bytes(64), handoff_id="a" * 32)
    assert prefill_pb2.PrefillSessionRequest(start=start).ByteSize() < MAX_MESSAGE_BYTES
    append = decode_pb2.AppendPrompt(request_id="a" * 32, token_ids=part)
    assert decode_pb2.DecodeSessionRequest(append_prompt=append).ByteSize() < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(("num_events", "fits"), [(EVENTS_PER_MESSAGE, True), (2 * EVENTS_PER_MESSAGE, False)])
def test_a_message_of_every_choices_first_tokens_with_all_alternatives_fits_the_bound(
    num_events: int, fits: bool
) -> None:
    token = SampledToken(2**32 - 1, 2**32 - 1, -1.5, ((2**32 - 1, -1.5),) * MAX_LOGPROBS)
    first = prefill_pb2.FirstTokens(
        tokens=[codec.token_to_proto(token)] * MAX_CHOICES, queue_s=1.5, prefill_s=1.5, cached_tokens=2**32 - 1
    )
    events = [prefill_pb2.PrefillEvent(handoff_id="a" * 32, first_tokens=first)] * num_events
    response = prefill_pb2.PrefillSessionResponse(events=prefill_pb2.PrefillEvents(events=events))
    assert (response.ByteSize() < MAX_MESSAGE_BYTES) is fits


# The prompt's log-probabilities


@given(st.lists(st.tuples(uint32, uint32, float32, st.lists(st.tuples(uint32, float32), max_size=20)), max_size=9))
def test_a_prompts_scored_tokens_come_back_as_they_were(
    values: list[tuple[int, int, float, list[tuple[int, float]]]],
) -> None:
    tokens = [
        PromptToken(position, token_id, logprob, tuple(alternatives))
        for position, token_id, logprob, alternatives in values
    ]
    parts = codec.prompt_token_parts(tokens)
    assert [codec.prompt_token_from_proto(over_the_wire(each)) for part in parts for each in part] == tokens


@pytest.mark.parametrize(("num_tokens", "sizes"), [(0, []), (2, [2]), (3, [3]), (4, [3, 1]), (9, [3, 3, 3])])
def test_a_prompts_scored_tokens_are_split_in_order(
    num_tokens: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "PROMPT_TOKENS_PER_MESSAGE", 3)
    parts = list(codec.prompt_token_parts([PromptToken(position, 7, -1.0) for position in range(num_tokens)]))
    assert [len(part) for part in parts] == sizes
    assert [token.index for part in parts for token in part] == list(range(num_tokens))


# Choices


@pytest.mark.parametrize(
    ("n", "first_token_index", "choice_index", "choices"),
    [
        (None, 0, 0, (0,)),
        (1, 0, 0, (0,)),
        (3, 0, 0, (0, 1, 2)),
        (16, 0, 0, tuple(range(16))),
        (None, 5, 2, (2,)),
        (1, 5, 0, (0,)),
        # These are refused; each choice that may be waited for is told so, and no more than there can be.
        (0, 0, 0, (0,)),
        (17, 0, 0, tuple(range(16))),
        (2**32 - 1, 0, 0, tuple(range(16))),
        (3, 5, 2, (2,)),
    ],
)
def test_a_request_has_all_its_choices_or_after_a_restart_one(
    n: int | None, first_token_index: int, choice_index: int, choices: tuple[int, ...]
) -> None:
    sampling = common_pb2.SamplingParams(n=n)
    found = codec.choices_from_proto(sampling, first_token_index=first_token_index, choice_index=choice_index)
    assert found == choices


# Penalties


def test_penalties_reach_the_engine_one_by_one() -> None:
    params = common_pb2.SamplingParams(
        repetition_penalty=1.5, presence_penalty=-0.5, frequency_penalty=0.25, prompt_logprobs=3
    )
    sampling = codec.sampling_from_proto(over_the_wire(params), eos_token_ids=())
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5, 0.25)
    assert sampling.num_prompt_logprobs == 3
    assert sampling.is_penalised


def test_penalties_that_are_unset_change_nothing() -> None:
    sampling = codec.sampling_from_proto(over_the_wire(SAMPLING), eos_token_ids=())
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    assert sampling.num_prompt_logprobs is None
    assert not sampling.is_penalised


def test_log_probabilities_of_the_prompt_without_alternatives_are_not_none_at_all() -> None:
    sampling = codec.sampling_from_proto(common_pb2.SamplingParams(prompt_logprobs=0), eos_token_ids=())
    assert sampling.num_prompt_logprobs == 0
