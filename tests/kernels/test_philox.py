"""The generator against its authors' published vectors, and the numbers made of it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.philox import GROUP_TOKENS, gumbel, philox4x32, random_bits, uniform

ALL = 0xFFFFFFFF
# Known-answer vectors of the Random123 distribution: counter, key, result.
VECTORS = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ALL] * 4, (ALL, ALL), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
TOKENS = np.arange(20_000)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    columns = np.array(counter, dtype=np.uint64)[:, None].repeat(3, axis=1)
    assert philox4x32(columns, key).T.tolist() == [expected] * 3


def test_columns_do_not_influence_one_another() -> None:
    counters = np.arange(40, dtype=np.uint64).reshape(4, 10)
    alone = [philox4x32(counters[:, i : i + 1], (9, 8))[:, 0].tolist() for i in range(10)]
    assert philox4x32(counters, (9, 8)).T.tolist() == alone


@pytest.mark.parametrize("stream", [0, 1])
def test_four_indices_share_the_blocks_of_two_parts_a_word_of_each_for_each(stream: int) -> None:
    seed, position, choice = 0xA4093822_299F31D0, 5, 3
    upper, lower = (
        philox4x32(np.array([[19], [position], [choice], [part]], dtype=np.uint64), (0x299F31D0, 0xA4093822))[:, 0]
        for part in (2 * stream, 2 * stream + 1)
    )
    expected = [int(high) << 32 | int(low) for high, low in zip(upper, lower, strict=True)]
    bits = random_bits(np.array([76, 77, 78, 79]), seed=seed, choice=choice, output_index=position, stream=stream)
    assert bits.tolist() == expected


@pytest.mark.parametrize("number", [random_bits, gumbel])
def test_a_token_has_the_same_number_whichever_tokens_are_asked_with_it(
    number: Callable[..., NDArray[np.uint64] | NDArray[np.float64]],
) -> None:
    everything = number(TOKENS, seed=4, choice=0, output_index=9)
    some = np.array([17, 3, 19_999])
    assert number(some, seed=4, choice=0, output_index=9).tolist() == everything[some].tolist()


@pytest.mark.parametrize("changed", [{"seed": 5}, {"seed": 4 + 2**32}, {"choice": 1}, {"output_index": 10}], ids=str)
def test_seed_choice_and_position_each_change_every_number(changed: dict[str, int]) -> None:
    base = {"seed": 4, "choice": 0, "output_index": 9}
    first, second = gumbel(TOKENS, **base), gumbel(TOKENS, **(base | changed))
    assert (first != second).all()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(TOKENS))


def test_the_streams_are_unrelated() -> None:
    groups, tokens = (
        uniform(random_bits(TOKENS, seed=1, choice=0, output_index=0, stream=stream)) for stream in (0, 1)
    )
    assert abs(np.corrcoef(groups, tokens)[0, 1]) < 4 / math.sqrt(len(TOKENS))


def test_uniform_is_uniform_and_never_0_or_1() -> None:
    numbers = uniform(random_bits(TOKENS, seed=1, choice=0, output_index=0))
    assert 0 < numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    chi_square = ((counts - len(TOKENS) / 50) ** 2 / (len(TOKENS) / 50)).sum()
    assert 49 - 4 * math.sqrt(2 * 49) < chi_square < 49 + 4 * math.sqrt(2 * 49)


def test_uniform_is_made_of_the_upper_bits() -> None:
    bits = np.array([0, 0xFFF, 0x1000, 2**64 - 1], dtype=np.uint64)
    assert uniform(bits).tolist() == [2.0**-53, 2.0**-53, 3 * 2.0**-53, 1 - 2.0**-53]


@pytest.mark.parametrize("word", [0, ALL])
def test_extreme_words_still_make_finite_noise(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    monkeypatch.setattr("kernels.philox.philox4x32", lambda counter, _: np.full(counter.shape, word, dtype=np.uint64))
    assert np.isfinite(gumbel(np.array([0, 63]), seed=0, choice=0, output_index=0)).all()


def noise_of_groups(num_groups: int) -> NDArray[np.float64]:
    """[num_groups, GROUP_TOKENS]"""
    noise = gumbel(np.arange(num_groups * GROUP_TOKENS), seed=2, choice=1, output_index=3)
    return noise.reshape(num_groups, GROUP_TOKENS)


def test_gumbel_noise_follows_its_distribution() -> None:
    # Kolmogorov and Smirnov's distance, which stays below 2 / sqrt(n) but once in three thousand times.
    noise = np.sort(noise_of_groups(2000).ravel())
    expected = np.exp(-np.exp(-noise))
    assert abs(expected - (np.arange(len(noise)) + 0.5) / len(noise)).max() < 2 / math.sqrt(len(noise))


def test_what_is_drawn_for_a_group_is_the_most_of_its_noise_and_whose_it_is() -> None:
    noise = noise_of_groups(50)
    bits = random_bits(np.arange(50), seed=2, choice=1, output_index=3, stream=0)
    assert noise.argmax(axis=1).tolist() == (bits % np.uint64(GROUP_TOKENS)).tolist()
    assert noise.max(axis=1) == pytest.approx(-np.log(-np.log(uniform(bits)) / GROUP_TOKENS), rel=1e-14)


def test_every_token_of_a_group_has_its_most_as_often() -> None:
    holders = np.bincount(noise_of_groups(20_000).argmax(axis=1), minlength=GROUP_TOKENS)
    expected = 20_000 / GROUP_TOKENS
    chi_square, freedom = ((holders - expected) ** 2 / expected).sum(), GROUP_TOKENS - 1
    assert freedom - 4 * math.sqrt(2 * freedom) < chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_tokens_of_a_group_are_independent_of_one_another() -> None:
    # Of uniform numbers: no pair of places is correlated, nor is the number of a group's that are in the upper half
    # anything but binomial, whose variance correlation of any sign would change.
    numbers = np.exp(-np.exp(-noise_of_groups(20_000)))
    correlations = np.corrcoef(numbers.T)[np.triu_indices(GROUP_TOKENS, 1)]
    assert abs(correlations).max() < 5 / math.sqrt(20_000)
    for share in (0.5, 0.9, 0.99):
        counts = (numbers > share).sum(axis=1)
        variance = GROUP_TOKENS * share * (1 - share)
        assert counts.mean() == pytest.approx(GROUP_TOKENS * (1 - share), abs=4 * math.sqrt(variance / 20_000))
        assert counts.var() == pytest.approx(variance, rel=0.06)
