"""The short form of the bar `system`: few requests to one model, and systems in which several ways are taken."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bars.equal_tokens import NO_CACHE, RELAY, SINGLE
from tests.loop import run
from tests.same_tokens import observed, ways
from tests.same_tokens.asking import MAX_PROMPT_TOKENS, Asked, draw_requests
from tests.same_tokens.bits import AnswerBits, ChoiceBits, TokenBits, first_difference
from tests.same_tokens.models import ODD, make_odd_model
from tests.same_tokens.observed import Condition
from tests.same_tokens.sessions import restarts
from tests.same_tokens.system import FEW_BLOCKS, REFERENCE, UNCACHED_DECODE, Family, Finding, Setup, budget, take_all
from tests.same_tokens.ways import Taken

HANDED_OVER_AGAIN = ways.restarting(observed.handed_over("tcp"), observed.handed_over_bytes)
SETUPS = (
    REFERENCE,
    Setup((*SINGLE[:-1], "2", *budget(64)), (ways.cut_by(64), ways.FULL_HIT)),
    Setup((*RELAY, NO_CACHE, *FEW_BLOCKS), (ways.PREEMPTED,)),
    Setup(
        (*RELAY, "--transports", "tcp"),
        (ways.handing_over("tcp"), ways.PREFILL_HIT, HANDED_OVER_AGAIN),
        UNCACHED_DECODE,
    ),
)


@pytest.fixture(scope="module")
def requests() -> list[Asked]:
    return draw_requests(16, seed=6, vocab_size=ODD.vocab_size)


def test_requests_cross_attention_tiles_and_are_of_every_kind(requests: Sequence[Asked]) -> None:
    lengths = sorted(len(asked.token_ids) for asked in requests)
    assert (lengths[0], lengths[-1]) == (1, MAX_PROMPT_TOKENS)
    assert sum(length > 3 * 64 for length in lengths) >= 3
    assert {asked.num_choices for asked in requests} == {1, 2, 3, 4}
    assert {asked.sampling["temperature"] > 0 for asked in requests} == {False, True}
    assert {bool(asked.sampling["stop_token_ids"]) for asked in requests} == {False, True}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_logprobs"):
        assert {name in asked.sampling for asked in requests} == {False, True}


def test_every_way_brings_the_bits_of_the_reference(requests: Sequence[Asked], tmp_path: Path) -> None:
    model = make_odd_model(tmp_path / "odd", seed=3)
    findings = run(take_all(Family("odd", str(model), ("--dtype", "float32"), SETUPS, requests)))
    assert [failure for finding in findings for failure in finding.failures] == []
    assert [len(finding.taken.conditions) for finding in findings] == [2, 2, 1, 2, 3, 3, 3, 3, 3]
    reasons = {choice.finish_reason for answer in findings[0].taken.outputs for choice in answer.choices}
    assert reasons == {"stop", "length"}
    assert sum(answer.num_tokens for finding in findings for answer in finding.taken.outputs) > 10_000


def make_tokens(*logprobs: float) -> tuple[TokenBits, ...]:
    return tuple(TokenBits(5, logprob.hex(), ()) for logprob in logprobs)


def make_answer(*logprobs: float, reason: str = "length", scores: Sequence[float] = ()) -> AnswerBits:
    return AnswerBits(make_tokens(*scores), (ChoiceBits(make_tokens(*logprobs), reason),))


WHOLE = make_answer(0.0, -2.0, -3.0, scores=[-1.0])


@pytest.mark.parametrize(
    ("actual", "difference"),
    [
        (
            make_answer(-0.0, -2.0, -3.0, scores=[-1.0]),
            "choice 0: token 0: (5, '-0x0.0p+0', ()) instead of (5, '0x0.0p+0', ())",
        ),
        (
            make_answer(0.0, -2.0, -3.5, scores=[-1.0]),
            "choice 0: token 2: (5, '-0x1.c000000000000p+1', ()) instead of (5, '-0x1.8000000000000p+1', ())",
        ),
        (WHOLE, None),
        (make_answer(0.0, scores=[-1.0]), "choice 0: 1 tokens instead of 3"),
        (make_answer(0.0, -2.0, -3.0, reason="stop", scores=[-1.0]), "choice 0: ended by stop instead of length"),
        (make_answer(0.0, -2.0, -3.0), "prompt: 0 tokens instead of 1"),
        (AnswerBits(make_tokens(-1.0), ()), "0 choices instead of 1"),
    ],
    ids=["a sign", "the last token", "equal", "too few tokens", "another end", "no scores", "no choice"],
)
def test_a_difference_is_told_with_its_place(actual: AnswerBits, difference: str | None) -> None:
    found = first_difference(["asked"], [actual], [WHOLE])
    assert found == (difference and f"request 0 (asked){':' if difference.startswith('0 c') else ','} {difference}")


def test_a_condition_that_did_not_occur_is_a_failure() -> None:
    taken = Taken((), [WHOLE], [WHOLE], [Condition("tokens recomputed", 0, 0), Condition("cuts", 6, 7)])
    finding = Finding("odd", "preempted, 16 at a time", "--num-blocks 9", taken, None)
    assert finding.failures == [
        "odd, preempted, 16 at a time (--num-blocks 9): 0 tokens recomputed, at least 1 were to be",
        "odd, preempted, 16 at a time (--num-blocks 9): 6 cuts, at least 7 were to be",
    ]
    met = dataclasses.replace(taken, conditions=[Condition("tokens recomputed", 1, 0), Condition("cuts", 7, 7)])
    assert dataclasses.replace(finding, taken=met).failures == []


def test_a_restart_is_due_what_follows_its_head_of_every_choice_that_has_two_tokens(requests: Sequence[Asked]) -> None:
    asked = dataclasses.replace(requests[0], restart_at=(0.0, 0.99, 0.5, 0.5))
    whole = AnswerBits(
        make_tokens(-9.0),
        tuple(ChoiceBits(make_tokens(*map(float, range(1, 1 + length))), "length") for length in (4, 4, 1, 2)),
    )
    found = restarts([asked], [whole])
    assert [(start.choice, len(start.head)) for start, _ in found] == [(0, 1), (1, 3), (3, 1)]
    assert [due.choices[0].tokens for _, due in found] == [
        make_tokens(2.0, 3.0, 4.0),
        make_tokens(4.0),
        make_tokens(2.0),
    ]
    assert {due.prompt for _, due in found} == {make_tokens(-9.0)}
