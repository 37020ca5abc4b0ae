"""Compiled drawing and scoring: the same tokens as the specification, and the same bits however rows are computed."""

import math
import random
import statistics
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import sampling
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import InstructionSet
from kernels.philox import GROUP_TOKENS, gumbel
from kernels.sampling import Penalties, TokenDraw

BEST = CpuBackend(threads=1)
MACHINES = [(BEST.isa, 1), (BEST.isa, 2), (BEST.isa, 3), *((isa, 2) for isa in InstructionSet if isa < BEST.isa)]
VOCAB_SIZES = (1, 2, 63, 64, 65, 97, 256, 257, 5003)


@pytest.fixture(params=MACHINES, ids=lambda pair: f"{pair[0].name.lower()}-{pair[1]}")
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    isa, threads = request.param
    return CpuBackend(threads=threads, instruction_set=isa)


def make_logits(rows: int, vocab_size: int, *, seed: int = 1, width: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * width


def make_draws(count: int, *, rows: int, vocab_size: int, seed: int) -> list[TokenDraw]:
    """Draws of every kind, mixed. At least one token is never banned."""
    dice = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [dice.randrange(vocab_size) for _ in range(dice.randrange(most))]

    return [
        TokenDraw(
            dice.randrange(rows),
            dice.choice([0.0, 0.01, 0.7, 1.0, 1.6]),
            top_k=dice.choice([0, 0, 1, 5, 50, 2000, 2**32 - 1]),
            top_p=dice.choice([1.0, 1.0, 0.95, 0.5, 1e-4]),
            seed=dice.randrange(2**64),
            choice=dice.randrange(16),
            output_index=dice.randrange(4000),
            banned=dice.choice([(), (vocab_size + 3, -1, 0)]) if vocab_size > 1 else (),
            penalties=dice.choice(
                [
                    None,
                    Penalties(dice.choice([0.5, 1.0, 1.3]), 0.5, -0.25, ids(20), ids(400)),
                    Penalties(1.2, 0, 0, (), ()),
                ]
            ),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_tokens_are_those_of_the_specification(backend: CpuBackend, vocab_size: int) -> None:
    for seed, width in enumerate((0.1, 1.0, 6.0)):
        logits = make_logits(7, vocab_size, seed=seed, width=width)
        draws = make_draws(60, rows=7, vocab_size=vocab_size, seed=seed)
        assert backend.sample(logits, draws) == sampling.sample(logits, draws)


def test_thousands_of_rows_draw_what_the_specification_draws() -> None:
    # Only the polynomial of exp differs, by a rounding of top-p's weights: so seldom that none of these shows it.
    logits = make_logits(64, 3001, seed=5, width=3.0)
    draws = make_draws(4000, rows=64, vocab_size=3001, seed=6)
    assert BEST.sample(logits, draws) == sampling.sample(logits, draws)


def test_the_likeliest_of_equals_is_the_lower_id(backend: CpuBackend) -> None:
    logits = torch.zeros(2, 3000)
    logits[0, [17, 2900]] = 1.0
    logits[1] = -0.0
    logits[1, 1] = 0.0
    assert backend.sample(logits, [TokenDraw(0, 0.0), TokenDraw(1, 0.0)]) == [17, 0]
    scores = backend.score_tokens(logits, torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    assert scores.top_ids.tolist() == [[17, 2900, 0], [0, 1, 2]]


@pytest.mark.parametrize("vocab_size", [64, 1000])
def test_equal_logits_are_cut_at_the_lower_ids(backend: CpuBackend, vocab_size: int) -> None:
    # Logits of few values: every filter cuts in the middle of equals.
    logits = (make_logits(5, vocab_size, seed=7) * 1.5).round()
    draws = make_draws(200, rows=5, vocab_size=vocab_size, seed=8)
    assert backend.sample(logits, draws) == sampling.sample(logits, draws)


def test_a_token_does_not_depend_on_machine_batch_or_order(backend: CpuBackend) -> None:
    logits, draws = make_logits(6, 70_001, seed=9), make_draws(24, rows=6, vocab_size=70_001, seed=10)
    alone = [BEST.sample(logits[draw.row : draw.row + 1], [draw._replace(row=0)])[0] for draw in draws]
    assert backend.sample(logits, draws) == alone
    assert backend.sample(logits, draws[::-1]) == alone[::-1]


@pytest.mark.parametrize("width", [1e-3, 1.0, 4.0])
def test_what_is_skipped_could_not_have_won(width: float) -> None:
    # All noise of all tokens, in float64, against a kernel that makes as little of it as it can.
    logits = make_logits(1, 20_000, seed=11, width=width)
    for position in range(40):
        draw = TokenDraw(0, 1.0, seed=12, output_index=position)
        noise = gumbel(np.arange(20_000), seed=12, choice=0, output_index=position)
        assert BEST.sample(logits, [draw]) == [int(((logits - logits.max()).numpy()[0] + noise).argmax())]


def test_draws_follow_the_softmax_over_a_vocabulary_of_several_groups() -> None:
    logits = make_logits(1, 12 * GROUP_TOKENS + 5, seed=13, width=1.5)
    count = 20_000
    drawn = BEST.sample(logits, [TokenDraw(0, 0.8, seed=14, output_index=i) for i in range(count)])
    expected = (logits[0].double() / 0.8).softmax(-1).numpy() * count
    likely = expected >= 5
    counts = np.bincount(drawn, minlength=len(expected))
    pairs = [*zip(counts[likely], expected[likely], strict=True), (counts[~likely].sum(), expected[~likely].sum())]
    chi_square = sum((seen - awaited) ** 2 / awaited for seen, awaited in pairs)
    freedom = len(pairs) - 1
    assert freedom > 200
    assert freedom - 4 * math.sqrt(2 * freedom) < chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_choices_and_neighbouring_tokens_draw_independently() -> None:
    # Four tokens share a block of random words; each must win its share, and two choices must agree by chance alone.
    logits = torch.zeros(1, 8)
    count = 8000
    first, second = (
        np.array(BEST.sample(logits, [TokenDraw(0, 1.0, seed=3, choice=choice, output_index=i) for i in range(count)]))
        for choice in (0, 1)
    )
    for drawn in (first, second):
        deviations = (np.bincount(drawn, minlength=8) - count / 8) / math.sqrt(count / 8 * 7 / 8)
        assert abs(deviations).max() < 4
    agreements = int((first == second).sum())
    assert abs(agreements - count / 8) < 4 * math.sqrt(count / 8 * 7 / 8)


@pytest.mark.parametrize(("top_k", "top_p"), [*product([1, 255, 700, 4999, 5000, 0], [0.001, 0.3, 0.999999, 1.0])])
def test_filters_of_every_size_keep_what_the_specification_keeps(top_k: int, top_p: float) -> None:
    logits = make_logits(2, 5000, seed=15)
    draws = [TokenDraw(i % 2, 1.5, top_k=top_k, top_p=top_p, seed=i) for i in range(50)]
    assert BEST.sample(logits, draws) == sampling.sample(logits, draws)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_a_nucleus_ends_at_the_very_token_that_reaches_the_share(backend: CpuBackend, top_p: float) -> None:
    # Equal weights: their sums are exact, and a hundredth too many or too few would move the end by several tokens.
    draws = [TokenDraw(0, 1.0, top_p=top_p, seed=2, output_index=i) for i in range(4000)]
    drawn = backend.sample(torch.zeros(1, 1000), draws)
    assert max(drawn) == 1000 * top_p - 1


@pytest.mark.parametrize("top_p", [1e-9, 1 - 1e-9])
def test_a_share_of_nearly_nothing_or_everything_is_drawn_as_specified(top_p: float) -> None:
    logits = make_logits(2, 3000, seed=21, width=3.0)
    draws = [TokenDraw(i % 2, 1.0, top_p=top_p, seed=i) for i in range(60)]
    assert BEST.sample(logits, draws) == sampling.sample(logits, draws)


@pytest.mark.parametrize("width", [0.1, 3.0])
def test_nuclei_of_a_large_vocabulary_are_those_of_the_specification(width: float) -> None:
    logits = make_logits(2, 140_001, seed=22, width=width)
    draws = [
        TokenDraw(i % 2, 1.0, top_k=top_k, top_p=top_p, seed=i)
        for i, (top_k, top_p) in enumerate(product([0, 100_000], [0.3, 0.5, 0.9, 0.99]))
    ]
    assert BEST.sample(logits, draws) == sampling.sample(logits, draws)


def test_penalties_and_bans_reach_the_first_and_the_last_token_of_every_group() -> None:
    # Only what is changed differs: were one left out, or another one hit, it would be drawn.
    vocab_size = 5 * GROUP_TOKENS + 7
    logits = torch.zeros(1, vocab_size)
    for kept in (0, GROUP_TOKENS - 1, GROUP_TOKENS, 5 * GROUP_TOKENS, vocab_size - 1):
        others = [token for token in range(vocab_size) if token != kept]
        frequent = Penalties(1.0, 0.0, 1.0, (), others)
        present = Penalties(1.0, 1.0, 0.0, (), others[::-1] * 2)
        for draw in (TokenDraw(0, 0.0, banned=others), *(TokenDraw(0, 0.0, penalties=p) for p in (frequent, present))):
            assert BEST.sample(logits, [draw]) == [kept]
    repeated = Penalties(2.0, 0.0, 0.0, range(1, vocab_size), (1,) * 300)
    assert BEST.sample(logits + 1, [TokenDraw(0, 0.0, penalties=repeated)]) == [0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e6, 1e38])
def test_extreme_temperatures_are_drawn_as_specified(backend: CpuBackend, temperature: float) -> None:
    logits = make_logits(3, 700, seed=16)
    draws = [
        TokenDraw(i % 3, temperature, top_k=top_k, top_p=top_p, seed=i)
        for i, (top_k, top_p) in enumerate(product([0, 40], [1.0, 0.8]))
    ]
    assert backend.sample(logits, draws) == sampling.sample(logits, draws)


def test_a_low_temperature_still_draws_between_logits_that_nearly_tie() -> None:
    # Scores start at the largest logit: divided by the temperature as they are, both would round to one number.
    logits = torch.tensor([[100.0, 100.0 + 2**-17]])
    draws = [TokenDraw(0, 2**-17, seed=1, output_index=i) for i in range(2000)]
    share = statistics.mean(BEST.sample(logits, draws))
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.04)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 255, 256, 299])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_refused_wherever_it_is(bad: float, at: int, temperature: float) -> None:
    logits = make_logits(2, 300)
    logits[1, at] = bad
    for compute in (BEST.sample, sampling.sample):
        with pytest.raises(ArithmeticError, match="logits are not finite"):
            compute(logits, [TokenDraw(0, temperature), TokenDraw(1, temperature)])
        assert compute(logits, [TokenDraw(0, 0.0)]) == [int(logits[0].argmax())]
    for score in (BEST.score_tokens, sampling.score_tokens):
        with pytest.raises(ArithmeticError, match="logits are not finite"):
            score(logits, torch.tensor([0, 1]), torch.tensor([3, 4]), 2)


def test_banning_everything_and_penalties_that_overflow_are_refused() -> None:
    logits = torch.tensor([[1.0, 3e38]])
    for compute in (BEST.sample, sampling.sample):
        with pytest.raises(ArithmeticError, match="every token is banned"):
            compute(logits, [TokenDraw(0, 1.0, banned=(0, 1))])
        with pytest.raises(ArithmeticError, match="logits are not finite"):
            compute(logits, [TokenDraw(0, 1.0, penalties=Penalties(0.1, 0, 0, (1,), ()))])


def test_no_draws_no_tokens_and_logits_may_be_strided_but_are_never_written_to(backend: CpuBackend) -> None:
    assert backend.sample(torch.zeros(0, 5), []) == []
    wide = make_logits(4, 1200, seed=17)
    before = wide.clone()
    draws = make_draws(30, rows=4, vocab_size=600, seed=18)
    for view in (wide[:, :600], wide[:, ::2]):
        assert backend.sample(view, draws) == sampling.sample(view.contiguous(), draws)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_written_anew_are_read_anew(dtype: torch.dtype) -> None:
    backend, wide = CpuBackend(threads=1), make_logits(2, 600, seed=19).to(dtype)
    for view in (wide, wide[:, ::2], wide[:1]):
        for likeliest in (7, 250):
            view[0, likeliest] = 50.0
            assert backend.sample(view, [TokenDraw(0, 0.0)]) == [likeliest]
            view[0, likeliest] = 0.0
        with pytest.raises(IndexError, match=f"outside the {len(view)} there are"):
            backend.sample(view, [TokenDraw(len(view), 0.0)])


def test_more_output_than_vocabulary_is_counted() -> None:
    logits = torch.tensor([[5.0, 0.0]])
    (token,) = BEST.sample(logits, [TokenDraw(0, 0.0, penalties=Penalties(1.0, 0.0, 0.001, (), (0,) * 6000))])
    assert token == 1
    (token,) = BEST.sample(logits, [TokenDraw(0, 0.0, penalties=Penalties(1.0, 0.0, 0.001, (), (0,) * 4000))])
    assert token == 0


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_and_targets_outside_the_logits_are_refused(row: int) -> None:
    logits = make_logits(2, 10)
    with pytest.raises(IndexError, match="outside the 2 there are"):
        BEST.sample(logits, [TokenDraw(row, 1.0)])
    with pytest.raises(IndexError, match=r"outside the logits, \[2, 10\]"):
        BEST.score_tokens(logits, torch.tensor([row]), torch.tensor([0]), 0)
    for score, target in product((BEST.score_tokens, sampling.score_tokens), (-1, 10)):
        with pytest.raises(IndexError, match="target"):
            score(logits, torch.tensor([0]), torch.tensor([target]), 0)


@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 20_001])
def test_scores_have_the_bits_of_log_softmax_and_alternatives_its_order(backend: CpuBackend, vocab_size: int) -> None:
    logits = make_logits(5, vocab_size, seed=19, width=4.0)
    logits[3] = (logits[3]).round()
    rows, targets = torch.tensor([4, 0, 3, 3]), torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
    logprobs = BEST.log_softmax(logits)[rows]
    for count in (0, 1, 20, 10_000):
        scores = backend.score_tokens(logits, rows, targets, count)
        top_ids = logprobs.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(scores.logprobs, logprobs.gather(1, targets[:, None])[:, 0])
        assert torch.equal(scores.top_ids, top_ids)
        assert torch.equal(scores.top_logprobs, logprobs.gather(1, top_ids))


def test_scores_are_those_of_the_specification() -> None:
    logits = make_logits(5, 9001, seed=20, width=3.0)
    rows, targets = torch.arange(5), torch.arange(5) * 100
    ours, expected = (score(logits, rows, targets, 6) for score in (BEST.score_tokens, sampling.score_tokens))
    torch.testing.assert_close(ours.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=2e-6)
    assert torch.equal(ours.top_ids, expected.top_ids)


def test_logits_that_differ_but_score_alike_are_listed_by_id() -> None:
    # Far below the largest, neighbouring floats have one log-probability.
    low = -(2.0**-20)
    logits = torch.full((1, 1000), -9.0)
    logits[0, 700] = 2.0**13
    logits[0, 300], logits[0, 500] = low, 0.0
    assert BEST.log_softmax(logits)[0, 300] == BEST.log_softmax(logits)[0, 500]
    assert BEST.score_tokens(logits, torch.tensor([0]), torch.tensor([0]), 3).top_ids.tolist() == [[700, 300, 500]]
