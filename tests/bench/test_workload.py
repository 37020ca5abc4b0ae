"""Workloads: sizes as published, prompts that share nothing but what they should, Poisson arrivals."""

import statistics
from itertools import pairwise

import pytest

from bench.workload import FIRST_PROMPT_TOKEN_ID, W1, W2, W3, W4, Phase, Workload, plan_round


def plan(workload: Workload, seed: str = "1/0/ours") -> tuple[Phase, ...]:
    return plan_round(workload, seed=seed, vocab_size=32_000)


def test_one_stream_of_512_and_64() -> None:
    (phase,) = plan(W1)
    assert (phase.name, len(phase.requests), phase.concurrency, phase.output_tokens) == ("W1", 1, 1, 64)
    assert [len(request.prompt) for request in phase.requests] == [512]


def test_sixteen_at_once_of_128_and_64() -> None:
    (phase,) = plan(W2)
    assert (len(phase.requests), phase.concurrency, phase.output_tokens) == (16, 16, 64)
    assert {len(request.prompt) for request in phase.requests} == {128}
    assert {request.due_s for request in phase.requests} == {0.0}


def test_a_shared_beginning_has_a_cold_and_a_warm_phase_with_ends_of_their_own() -> None:
    cold, warm = plan(W3)
    assert (cold.name, warm.name) == ("W3 cold", "W3 warm")
    prompts = [request.prompt for phase in (cold, warm) for request in phase.requests]
    assert len(prompts) == 32
    assert {len(prompt) for prompt in prompts} == {1056}
    assert len({prompt[:1024] for prompt in prompts}) == 1
    assert len({prompt[1024:] for prompt in prompts}) == 32


def test_rounds_and_servers_share_no_beginning() -> None:
    seeds = [f"1/{number}/{server}" for number in range(3) for server in ("ours", "theirs")]
    prompts = [request.prompt for seed in seeds for each in (W1, W2, W3) for request in plan(each, seed)[0].requests]
    beginnings = {prompt[:16] for prompt in prompts}
    assert len(beginnings) == 6 * (1 + 16 + 1)


def test_equal_arguments_give_equal_rounds() -> None:
    assert plan(W2) == plan(W2)
    assert plan(W2) != plan(W2, "2/0/ours")


def test_prompts_hold_words_of_the_vocabulary_only() -> None:
    (phase,) = plan_round(W1, seed="1", vocab_size=FIRST_PROMPT_TOKEN_ID + 2)
    assert set(phase.requests[0].prompt) == {FIRST_PROMPT_TOKEN_ID, FIRST_PROMPT_TOKEN_ID + 1}
    with pytest.raises(ValueError, match="vocab_size is 262, needs more than 262"):
        plan_round(W1, seed="1", vocab_size=FIRST_PROMPT_TOKEN_ID)


def test_an_open_loop_sends_at_its_rate_and_begins_at_once() -> None:
    workload = Workload(name="many", prompt_tokens=1, output_tokens=1, num_requests=2000, concurrency=None, rate=4.0)
    (phase,) = plan(workload)
    due = [request.due_s for request in phase.requests]
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert due[0] == 0.0
    assert phase.concurrency is None
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # exponential: as wide as its mean


def test_a_closed_loop_becomes_an_open_one_of_the_same_size() -> None:
    workload = W4.at_rate(1.5)
    assert (workload.rate, workload.concurrency, workload.prompt_tokens) == (1.5, None, W4.prompt_tokens)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"concurrency": None}, "either a concurrency .* or a rate"),
        ({"rate": 1.0}, "either a concurrency .* or a rate"),
        ({"prompt_tokens": 0}, "at least one of everything"),
        ({"num_requests": 0}, "at least one of everything"),
        ({"concurrency": None, "rate": 0.0}, "a rate above 0"),
    ],
)
def test_a_workload_that_cannot_be_sent_is_refused(sizes: dict[str, float | None], message: str) -> None:
    given: dict[str, object] = {"name": "bad", "prompt_tokens": 1, "output_tokens": 1, **sizes}
    with pytest.raises(ValueError, match=message):
        Workload(**given)  # type: ignore[arg-type]
