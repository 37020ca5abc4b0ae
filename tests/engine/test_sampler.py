"""Sampling: exact sets, exact ties, distributions within bounds, and independence from everything else."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import SampledToken, SamplingParams
from engine.sampler import largest, sample
from engine.step import Draw
from kernels.backend import select
from tests.engine.model_directory import make_sampling

BACKEND = select("cpu")


def draw(logits: list[float] | Tensor, sampling: SamplingParams, *, output_index: int = 0) -> SampledToken:
    row = torch.as_tensor(logits, dtype=torch.float32)
    ((token,),) = sample(row[None], [Draw(sampling, output_index)], BACKEND)
    return token


def tokens(logits: list[float], count: int, sampling: SamplingParams) -> NDArray[np.int64]:
    """The tokens of `count` consecutive output positions, all with the same logits."""
    rows = torch.tensor([logits]).expand(count, -1)
    return np.array([t.token_id for (t,) in sample(rows, [Draw(sampling, i) for i in range(count)], BACKEND)])


def assert_distributed(drawn: NDArray[np.int64], probabilities: list[float]) -> None:
    """Chi-square within four standard deviations above its mean; impossible tokens never."""
    expected = np.array(probabilities) * len(drawn)
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    freedom = possible.sum() - 1
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


LOGITS = [1.0, 2.0, -1.0, 0.5, 2.5, 0.0]


def test_greedy_takes_the_largest_and_of_equals_the_lower_id() -> None:
    assert draw([0.0, 3.0, 1.0], make_sampling()).token_id == 1
    assert draw([0.0, 3.0, 3.0, 3.0], make_sampling()).token_id == 1
    assert draw([-0.0, 0.0], make_sampling()).token_id == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_follows_the_softmax_of_logits_over_temperature(temperature: float) -> None:
    drawn = tokens(LOGITS, 4000, make_sampling(temperature=temperature, seed=5))
    assert_distributed(drawn, softmax(LOGITS, temperature))


def test_a_very_low_temperature_is_greedy() -> None:
    assert set(tokens(LOGITS, 200, make_sampling(temperature=1e-6)).tolist()) == {4}


def test_top_k_keeps_exactly_k_and_their_proportions() -> None:
    drawn = tokens(LOGITS, 3000, make_sampling(temperature=1.0, top_k=3, seed=6))
    weights = [math.exp(x) if x in (2.5, 2.0, 1.0) else 0.0 for x in LOGITS]
    assert_distributed(drawn, [w / sum(weights) for w in weights])


def test_top_k_with_ties_at_the_border_keeps_the_lower_ids() -> None:
    drawn = tokens([1.0, 0.0, 1.0, 1.0, 1.0], 300, make_sampling(temperature=1.0, top_k=2))
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.5, 1), (0.500001, 2), (0.75, 2), (0.8, 3), (0.9999, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    # Powers of two, so that probabilities 1/2, 1/4, 1/8, 1/8 are exact up to one rounding of the logarithms.
    logits = [math.log2(p) * math.log(2) for p in (0.125, 0.5, 0.125, 0.25)]
    drawn = tokens(logits, 400, make_sampling(temperature=1.0, top_p=top_p))
    assert set(drawn.tolist()) == {1, 3, 0, 2} - set([2, 0, 3][: 4 - kept])


def test_top_p_with_ties_keeps_the_lower_ids() -> None:
    drawn = tokens([0.0] * 10, 400, make_sampling(temperature=1.0, top_p=0.3))
    assert set(drawn.tolist()) == {0, 1, 2}


def test_top_p_is_over_the_temperature_scaled_distribution() -> None:
    logits = [math.log(0.6), math.log(0.3), math.log(0.1)]
    assert set(tokens(logits, 300, make_sampling(temperature=1.0, top_p=0.6)).tolist()) == {0}
    assert set(tokens(logits, 300, make_sampling(temperature=2.0, top_p=0.6)).tolist()) == {0, 1}


def test_top_p_counts_over_what_top_k_left() -> None:
    logits = [math.log(0.4), math.log(0.3), math.log(0.2), math.log(0.1)]
    # Of the two that top-k leaves, the first has 4/7 > 0.55; of all four it has only 0.4.
    assert set(tokens(logits, 300, make_sampling(temperature=1.0, top_k=2, top_p=0.55)).tolist()) == {0}
    assert set(tokens(logits, 300, make_sampling(temperature=1.0, top_p=0.55)).tolist()) == {0, 1}


def test_a_token_does_not_depend_on_the_batch_or_the_order() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 50, generator=generator)
    draws = [
        Draw(make_sampling(temperature=0.9, seed=1), 4),
        Draw(make_sampling(), 2),
        Draw(make_sampling(temperature=1.2, top_k=7, seed=1, num_logprobs=None), 4),
        Draw(make_sampling(temperature=0.7, top_p=0.8, seed=2**64 - 1, num_logprobs=3), 0),
        Draw(make_sampling(min_tokens=9, stop_token_ids=frozenset({1, 2})), 2),
        Draw(make_sampling(temperature=1.0, seed=3), 100),
    ]
    together = sample(logits, draws, BACKEND)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0], [3], [1, 4]):
        assert sample(logits[order], [draws[i] for i in order], BACKEND) == [together[i] for i in order]


def test_noise_of_a_token_does_not_depend_on_the_filters() -> None:
    # The likeliest token under noise wins with or without filters that keep it.
    for position in range(50):
        free = draw(LOGITS, make_sampling(temperature=1.0, seed=8), output_index=position)
        filtered = draw(LOGITS, make_sampling(temperature=1.0, seed=8, top_k=2), output_index=position)
        if free.token_id in (1, 4):
            assert filtered.token_id == free.token_id


def test_equal_scores_under_noise_go_to_the_lower_id(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [1.0, 3.0, 2.0]
    monkeypatch.setattr("engine.sampler.gumbel", lambda ids, **_: -np.array(logits)[ids])
    for filters in ({}, {"top_k": 3}, {"top_p": 0.999}):
        assert draw(logits, make_sampling(temperature=1.0, **filters)).token_id == 0
    assert draw(logits, make_sampling(temperature=1.0, top_k=2)).token_id == 1


def test_stop_tokens_are_masked_until_min_tokens_is_reached() -> None:
    for temperature in (0.0, 1e-3):
        sampling = make_sampling(temperature=temperature, min_tokens=3, stop_token_ids=frozenset({4, 1, 10**6}))
        chosen = [draw(LOGITS, sampling, output_index=i).token_id for i in range(5)]
        assert chosen == [0, 0, 0, 4, 4]


def test_masking_every_token_is_an_error_not_a_token() -> None:
    with pytest.raises(ArithmeticError, match="every token is a stop token"):
        draw([1.0, 2.0], make_sampling(min_tokens=1, stop_token_ids=frozenset({0, 1})))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        draw([1.0, bad, 0.0], make_sampling(temperature=temperature))


def test_logprobs_are_of_the_raw_logits() -> None:
    expected = BACKEND.log_softmax(torch.tensor([LOGITS]))[0]
    masked = {"min_tokens": 1, "stop_token_ids": frozenset({4})}
    for sampling in (
        make_sampling(num_logprobs=2),
        make_sampling(temperature=1.9, top_k=1, num_logprobs=2),
        make_sampling(num_logprobs=2, **masked),
    ):
        token = draw(LOGITS, sampling)
        assert token.logprob == expected[token.token_id].item()
        assert token.top_logprobs == ((4, expected[4].item()), (1, expected[1].item()))


def test_num_logprobs_none_is_nothing_and_0_is_the_chosen_token_alone() -> None:
    assert draw(LOGITS, make_sampling(num_logprobs=None), output_index=6) == SampledToken(6, 4)
    alone = draw(LOGITS, make_sampling(num_logprobs=0))
    assert alone.logprob is not None
    assert alone.top_logprobs == ()


def test_alternatives_with_equal_logprobs_come_lower_id_first() -> None:
    top = draw([0.0, 1.0, 1.0, 0.0, 1.0], make_sampling(num_logprobs=4)).top_logprobs
    assert [token_id for token_id, _ in top] == [1, 2, 4, 0]
    assert [t for t, _ in draw([0.0, 1.0], make_sampling(num_logprobs=20)).top_logprobs] == [1, 0]


def test_logits_are_not_written_to() -> None:
    logits = torch.tensor([LOGITS])
    sampling = make_sampling(temperature=2.0, min_tokens=1, stop_token_ids=frozenset({4}), num_logprobs=1)
    sample(logits, [Draw(sampling, 0)], BACKEND)
    assert logits.tolist() == [LOGITS]


def test_no_rows_no_tokens() -> None:
    assert sample(torch.zeros(0, 5), [], BACKEND) == []


def test_largest_equals_a_full_sort() -> None:
    generator = np.random.default_rng(4)
    for _ in range(200):
        values = generator.integers(0, 6, size=generator.integers(1, 30)).astype(np.float64)
        count = int(generator.integers(0, 35))
        expected = sorted(range(len(values)), key=lambda i, v=values: (-v[i], i))[:count]  # type: ignore[misc]
        assert largest(values, count).tolist() == expected
