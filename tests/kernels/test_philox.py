"""The generator against its authors' published vectors, and the numbers made of it."""

import math

import numpy as np
import pytest

from kernels.philox import gumbel, philox4x32, uniform

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


def test_four_tokens_share_the_blocks_of_two_parts_a_word_of_each_for_each() -> None:
    seed, position, choice = 0xA4093822_299F31D0, 5, 3
    upper, lower = (
        philox4x32(np.array([[19], [position], [choice], [part]], dtype=np.uint64), (0x299F31D0, 0xA4093822))[:, 0]
        for part in (0, 1)
    )
    expected = [((int(high) << 20 | int(low) >> 12) + 0.5) / 2**52 for high, low in zip(upper, lower, strict=True)]
    tokens = np.array([76, 77, 78, 79])
    assert uniform(tokens, seed=seed, choice=choice, output_index=position).tolist() == expected


def test_a_token_has_the_same_number_whichever_tokens_are_asked_with_it() -> None:
    everything = uniform(TOKENS, seed=4, choice=0, output_index=9)
    some = np.array([17, 3, 19_999])
    assert uniform(some, seed=4, choice=0, output_index=9).tolist() == everything[some].tolist()


@pytest.mark.parametrize("changed", [{"seed": 5}, {"seed": 4 + 2**32}, {"choice": 1}, {"output_index": 10}], ids=str)
def test_seed_choice_and_position_each_change_every_number(changed: dict[str, int]) -> None:
    base = {"seed": 4, "choice": 0, "output_index": 9}
    first, second = uniform(TOKENS, **base), uniform(TOKENS, **(base | changed))
    assert (first != second).all()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(TOKENS))


def test_uniform_is_uniform_and_never_0_or_1() -> None:
    numbers = uniform(TOKENS, seed=1, choice=0, output_index=0)
    assert 0 < numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    chi_square = ((counts - len(TOKENS) / 50) ** 2 / (len(TOKENS) / 50)).sum()
    assert 49 - 4 * math.sqrt(2 * 49) < chi_square < 49 + 4 * math.sqrt(2 * 49)


def test_extreme_words_still_make_numbers_inside_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (0, ALL):
        monkeypatch.setattr("kernels.philox.philox4x32", lambda *_, w=word: np.full((4, 1), w, dtype=np.uint64))
        assert 0 < uniform(np.array([0]), seed=0, choice=0, output_index=0)[0] < 1
        assert np.isfinite(gumbel(np.array([0]), seed=0, choice=0, output_index=0)).all()


def test_gumbel_noise_has_the_mean_and_variance_of_its_distribution() -> None:
    noise = gumbel(TOKENS, seed=2, choice=0, output_index=3)
    deviation = math.pi / math.sqrt(6)
    assert noise.mean() == pytest.approx(0.57721566, abs=4 * deviation / math.sqrt(len(TOKENS)))
    assert noise.std() == pytest.approx(deviation, rel=0.05)
