"""Sampling: exact sets, exact ties, distributions within bounds, and independence from everything else."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import PromptToken, SampledToken, SamplingParams
from engine.sampler import Target, sample, score
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
    assert set(tokens(logits, 300, make_sampling(temperature=1.0, top_p=0.59)).tolist()) == {0}
    assert set(tokens(logits, 300, make_sampling(temperature=2.0, top_p=0.59)).tolist()) == {0, 1}


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


def test_stop_tokens_are_masked_until_min_tokens_is_reached() -> None:
    for temperature in (0.0, 1e-3):
        sampling = make_sampling(temperature=temperature, min_tokens=3, stop_token_ids=frozenset({4, 1, 10**6}))
        chosen = [draw(LOGITS, sampling, output_index=i).token_id for i in range(5)]
        assert chosen == [0, 0, 0, 4, 4]


def test_masking_every_token_is_an_error_not_a_token() -> None:
    with pytest.raises(ArithmeticError, match="every token is banned"):
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


def test_choices_share_the_logits_and_draw_with_noise_of_their_own() -> None:
    row = torch.tensor([[0.0] * 1000])
    sampling = make_sampling(temperature=1.0, seed=7)
    (together,) = sample(row, [Draw(sampling, 3, choices=(0, 2, 5))], BACKEND)
    assert [token.index for token in together] == [3, 3, 3]
    assert len({token.token_id for token in together}) == 3
    for choice, token in zip((0, 2, 5), together, strict=True):
        assert sample(row, [Draw(sampling, 3, choices=(choice,))], BACKEND) == [(token,)]


def test_a_draw_for_no_choice_has_no_token() -> None:
    assert (
        sample(torch.tensor([LOGITS] * 2), [Draw(make_sampling(), 0, choices=()), Draw(make_sampling(), 0)], BACKEND)[0]
        == ()
    )


def penalised(output: tuple[int, ...], prompt: tuple[int, ...] = (), **penalties: float) -> list[int]:
    """Ids of LOGITS from the likeliest to the least, found by banning the winners one by one."""
    order: list[int] = []
    while len(order) < len(LOGITS):
        sampling = make_sampling(min_tokens=99, stop_token_ids=frozenset(order), **penalties)
        draws = [Draw(sampling, 5, prompt_token_ids=prompt, output_token_ids=output)]
        order += [token.token_id for token in sample(torch.tensor([LOGITS]), draws, BACKEND)[0]]
    return order


def test_repetition_divides_positive_logits_and_multiplies_the_others_of_prompt_and_output_once() -> None:
    # [1.0, 2.0, -1.0, 0.5, 2.5, 0.0] becomes [1.0, 2.0 / 1.9, -1.9, 0.5, 2.5 / 1.9, 0.0].
    assert penalised((4, 4, 4), prompt=(1, 2, 2), repetition_penalty=1.9) == [4, 1, 0, 3, 5, 2]
    # Below 1 it favours them: 2.5 / 0.5 and -1.0 * 0.5.
    assert penalised((4,), prompt=(2,), repetition_penalty=0.5) == [4, 1, 0, 3, 5, 2]
    assert penalised((0,), prompt=(), repetition_penalty=0.25) == [0, 4, 1, 3, 5, 2]


def test_frequency_counts_and_presence_does_not_and_neither_sees_the_prompt() -> None:
    # 2.5 - 3 x 0.6 = 0.7 and 2.0 - 0.6 = 1.4
    assert penalised((4, 1, 4, 4), prompt=(0, 0, 0), frequency_penalty=0.6) == [1, 0, 4, 3, 5, 2]
    # 2.5 - 1.6 = 0.9 and 2.0 - 1.6 = 0.4
    assert penalised((4, 1, 4, 4), prompt=(0, 0, 0), presence_penalty=1.6) == [0, 4, 3, 1, 5, 2]
    assert penalised((2, 2), frequency_penalty=-2.0) == [2, 4, 1, 0, 3, 5]


def test_penalties_come_in_the_order_repetition_frequency_presence() -> None:
    # 2.5 / 2 - 2 x 0.5 - 0.5 = -0.25, below 0.0; any other order gives another number: (2.5 - 1.0 - 0.5) / 2 = 0.5.
    order = penalised((4, 4), repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.5)
    assert order == [1, 0, 3, 5, 4, 2]


def test_penalties_work_on_what_is_drawn_not_on_what_is_reported() -> None:
    sampling = make_sampling(presence_penalty=2.0, num_logprobs=1)
    ((token,),) = sample(torch.tensor([LOGITS]), [Draw(sampling, 1, output_token_ids=(4,))], BACKEND)
    expected = BACKEND.log_softmax(torch.tensor([LOGITS]))[0]
    assert (token.token_id, token.logprob) == (1, expected[1].item())
    assert token.top_logprobs == ((4, expected[4].item()),)


def test_penalised_rows_are_drawn_from_the_penalised_distribution() -> None:
    sampling = make_sampling(temperature=1.0, seed=4, frequency_penalty=1.0)
    rows = torch.tensor([LOGITS]).expand(4000, -1)
    draws = [Draw(sampling, i, output_token_ids=(4, 4, 1)) for i in range(4000)]
    drawn = np.array([token.token_id for (token,) in sample(rows, draws, BACKEND)])
    assert_distributed(drawn, softmax([1.0, 1.0, -1.0, 0.5, 0.5, 0.0], 1.0))


def test_penalties_are_as_many_as_there_are_numbers_and_leave_the_logits_alone() -> None:
    logits = torch.tensor([LOGITS])
    sampling = make_sampling(repetition_penalty=1.5, min_tokens=9, stop_token_ids=frozenset({4}))
    draw_of_unseen = Draw(sampling, 0, prompt_token_ids=(10**6, 3), output_token_ids=(10**6,))
    assert sample(logits, [draw_of_unseen], BACKEND)[0][0].token_id == 1
    assert logits.tolist() == [LOGITS]


def test_targets_are_scored_against_their_rows_with_as_many_alternatives_as_each_asks_for() -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    expected = BACKEND.log_softmax(logits)
    scored = score(logits, [Target(1, 2, 0), Target(2, 0, 2)], BACKEND)
    assert scored == [
        PromptToken(1, 2, expected[0, 2].item()),
        PromptToken(2, 0, expected[1, 0].item(), ((1, expected[1, 1].item()), (4, expected[1, 4].item()))),
    ]
    assert score(logits[:0], [], BACKEND) == []
    with pytest.raises(ArithmeticError, match="not finite"):
        score(torch.tensor([[1.0, math.nan]]), [Target(1, 0, 0)], BACKEND)
