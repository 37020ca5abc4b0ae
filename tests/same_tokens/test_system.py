"""The short form of the bar `system`: few requests, and systems in which several ways are taken."""

import dataclasses
from collections.abc import Sequence

import pytest

from tests.bars.equal_tokens import NO_CACHE, RELAY, SINGLE
from tests.e2e.prompts import MAX_PROMPT_TOKENS
from tests.same_tokens import ways
from tests.same_tokens.asking import SHORT_PROMPT_TOKENS, Asked, TokenBits, draw_requests, first_difference
from tests.same_tokens.system import (
    BFLOAT16,
    FEW_BLOCKS,
    REFERENCE,
    UNCACHED_DECODE,
    Finding,
    Setup,
    take_all,
)
from tests.same_tokens.ways import Taken

RESTARTED = ways.restarting("restarted", num_at_once=4)
HANDED_OVER_AGAIN = ways.restarting("restarted with a hand-off", num_at_once=4, transport="tcp")
TWO_THREADS = (*SINGLE[:-1], "2", "--max-batch-tokens", "64")
SHM = ways.handing_over("shm", num_at_once=1, max_prompt_tokens=SHORT_PROMPT_TOKENS)
TCP = ways.handing_over("tcp", num_at_once=8)
SETUPS = (
    Setup(TWO_THREADS, (ways.cut_by(64), ways.FULL_HIT)),
    Setup((*RELAY, NO_CACHE, *FEW_BLOCKS), (SHM, ways.PREEMPTED)),
    Setup((*RELAY, "--transports", "tcp"), (TCP, ways.PREFILL_HIT, HANDED_OVER_AGAIN), UNCACHED_DECODE),
)


@pytest.fixture(scope="module")
def requests() -> list[Asked]:
    return draw_requests(8, seed=6, max_prompt_tokens=MAX_PROMPT_TOKENS)


def failures_of(findings: Sequence[Finding]) -> list[str]:
    return [failure for finding in findings for failure in finding.failures]


def test_requests_cross_attention_tiles_and_are_of_both_kinds(requests: Sequence[Asked]) -> None:
    lengths = sorted(len(asked.token_ids) for asked in requests)
    assert lengths[0] == 1
    assert lengths[-1] == MAX_PROMPT_TOKENS
    assert sum(length > 3 * 64 for length in lengths) >= 3
    assert {asked.sampling["temperature"] > 0 for asked in requests} == {False, True}


def test_every_way_brings_the_bits_of_the_reference(requests: Sequence[Asked]) -> None:
    findings = take_all(REFERENCE, SETUPS, requests, own=(ways.BATCHED, RESTARTED))
    assert failures_of(findings) == []
    assert sum(finding.num_tokens for finding in findings) > 1000


def test_bfloat16_has_bits_of_its_own_that_are_the_same_in_a_batch_and_after_a_restart(
    requests: Sequence[Asked],
) -> None:
    findings = take_all((*REFERENCE, *BFLOAT16), (), requests, own=(ways.BATCHED, RESTARTED))
    assert failures_of(findings) == []


def make_output(*logprobs: float) -> list[TokenBits]:
    return [TokenBits(5, logprob.hex(), ()) for logprob in logprobs]


@pytest.mark.parametrize(
    ("actual", "difference"),
    [
        (make_output(-0.0, -2.0, -3.0), "token 0: (5, '-0x0.0p+0', ()) instead of (5, '0x0.0p+0', ())"),
        (
            make_output(-2.0, -3.5),
            "token 2: (5, '-0x1.c000000000000p+1', ()) instead of (5, '-0x1.8000000000000p+1', ())",
        ),
        (make_output(-2.0, -3.0), None),
        (make_output(), "0 tokens instead of 3"),
        (make_output(0.0, -2.0, -3.0, -4.0), "4 tokens instead of 3"),
    ],
    ids=["a sign", "a rest's last token", "an equal rest", "no tokens", "too many tokens"],
)
def test_a_difference_is_told_with_its_place(
    requests: Sequence[Asked], actual: list[TokenBits], difference: str | None
) -> None:
    found = first_difference(requests[:1], [actual], [make_output(0.0, -2.0, -3.0)])
    assert (found or "none").endswith(difference or "none")


def test_a_condition_that_did_not_occur_is_a_failure() -> None:
    finding = Finding(ways.PREEMPTED, "--num-blocks 9", 3, Taken([make_output(0.0)], 0, 0), None)
    assert finding.failures == ["preempted (--num-blocks 9): 0 tokens computed again, at least 1 were to be"]
    occurred = dataclasses.replace(finding, taken=Taken([make_output(0.0)], 1, 1))
    assert occurred.failures == []
