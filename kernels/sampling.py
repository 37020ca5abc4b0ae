"""Drawing tokens and scoring them: the values that say how, and the specification of what comes out, in plain numpy.

A token is a function of its row of logits and its draw alone. Scores are float32, noise is float64, and the weights
that top-p adds up are integers, so that no sum depends on an order: what a faster implementation skips or rearranges
cannot show. Only the polynomials behind exp and log may differ, by a rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.philox import gumbel

WEIGHT_BITS = 30
"""Top-p weighs tokens in units of 2^-30 of the likeliest one; what is below half a unit weighs nothing."""


class Penalties(NamedTuple):
    """How tokens that were seen already are made less likely. 1, 0 and 0 change nothing."""

    repetition: float
    presence: float
    frequency: float
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


class TokenDraw(NamedTuple):
    """One token to draw from row `row` of the logits.

    `temperature` 0, or so near that float32 cannot hold 1 / temperature, takes the likeliest token; `top_k` 0 and
    `top_p` 1 keep all. The noise is a function of `seed`, 64 bits, the token, `output_index` and `choice`. `banned`
    tokens are out of the question. Ids outside the vocabulary, banned or seen, are passed over.
    """

    row: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    output_index: int = 0
    banned: Sequence[int] = ()
    penalties: Penalties | None = None


class TokenScores(NamedTuple):
    """Log-probabilities, float32, of one token per row and of the row's likeliest ones.

    logprobs: [n]. top_ids, top_logprobs: [n, count], falling, of equals the lower id first.
    """

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def sample(logits: Tensor, draws: Sequence[TokenDraw]) -> list[int]:
    """Draws tokens: argmax over kept tokens i of (z_i - max z) rate + noise_i, of equals the lower id.

    z is the row after penalties and bans, rate is 1 / temperature. Repetition: z / r where z > 0, else z r, for every
    token seen; then z - frequency x count and z - presence for every token of the output (Keskar et al. 2019,
    arXiv 1909.05858, section 4.1, with both signs). Kept are the top_k largest z, ties to the lower id; of these, in
    falling order, the fewest whose weights reach top_p of their total (Holtzman et al. 2019, arXiv 1904.09751, section
    3.1), with weights round(2^30 exp((z_i - max z) rate)). Gumbel noise makes the argmax a draw from the softmax.

    What no filter keeps has noise all the same, so a token's noise, and the order of any two, is a matter of the draw
    alone: logits that differ by little, or a filter that keeps more, seldom draw another token.

    logits: [rows, vocab_size], float32, on the CPU; not written to. Returns one id for each draw. Raises
    ArithmeticError for a row with a NaN or an infinity, or with nothing left to choose. Bytes: 4 rows vocab_size.
    """
    values: NDArray[np.float32] = logits.numpy()
    return [_draw(values[draw.row], draw) for draw in draws]


def score_tokens(logits: Tensor, rows: Tensor, targets: Tensor, count: int) -> TokenScores:
    """Log-probability of targets[i] in row rows[i], and of the `count` likeliest tokens (all, when there are fewer).

    logits: [R, vocab_size], float32, on the CPU; not written to. rows, targets: [n], int64. Values are those of
    `reference.log_softmax`. Raises ArithmeticError for a row with a NaN or an infinity, IndexError for a row or target
    outside the logits. Bytes: 8 n vocab_size.
    """
    chosen = logits[rows]
    if not chosen.isfinite().all():
        raise ArithmeticError("the model's logits are not finite")
    if ((targets < 0) | (targets >= logits.shape[1])).any():
        raise IndexError(f"a target is outside the vocabulary of {logits.shape[1]}")
    logprobs = chosen.log_softmax(dim=-1)
    top_ids = logprobs.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return TokenScores(logprobs.gather(1, targets[:, None])[:, 0], top_ids, logprobs.gather(1, top_ids))


def _draw(logits: NDArray[np.float32], draw: TokenDraw) -> int:
    """One token. logits: [vocab_size]."""
    if not np.isfinite(logits).all():
        raise ArithmeticError("the model's logits are not finite")
    z = _adjusted(logits, draw)
    largest = z.max()
    if largest == -np.inf:
        raise ArithmeticError("every token is banned")
    if largest == np.inf:
        raise ArithmeticError("the model's logits are not finite")
    with np.errstate(over="ignore", divide="ignore"):
        rate = np.float32(1) / np.float32(draw.temperature)
        if rate == np.inf:
            return int(z.argmax())
        scores = (z - largest) * rate
    kept = _kept(z, scores, draw)
    noise = gumbel(kept, seed=draw.seed, choice=draw.choice, output_index=draw.output_index)
    return int(kept[(scores[kept].astype(np.float64) + noise).argmax()])


def _adjusted(logits: NDArray[np.float32], draw: TokenDraw) -> NDArray[np.float32]:
    """The row after penalties and bans: itself, when there are none. [vocab_size]."""
    if draw.penalties is None and not draw.banned:
        return logits
    z = logits.copy()
    if draw.penalties is not None:
        repetition, presence, frequency = (np.float32(penalty) for penalty in draw.penalties[:3])
        seen = _within([*draw.penalties.prompt_token_ids, *draw.penalties.output_token_ids], len(z))
        with np.errstate(over="ignore"):
            z[seen] = np.where(z[seen] > 0, z[seen] / repetition, z[seen] * repetition)
        ids, counts = np.unique(_within(draw.penalties.output_token_ids, len(z)), return_counts=True)
        z[ids] = (z[ids] - frequency * counts.astype(np.float32)) - presence
    z[_within(draw.banned, len(z))] = -np.inf
    return z


def _within(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    ids = np.array(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]


def _kept(z: NDArray[np.float32], scores: NDArray[np.float32], draw: TokenDraw) -> NDArray[np.int64]:
    """Ids that the filters keep, rising, at least one."""
    if draw.top_k == 0 and draw.top_p == 1.0:
        return np.arange(len(z))
    ids = np.argsort(-z, kind="stable")[: draw.top_k or None]
    if draw.top_p < 1.0:
        weights = np.rint(np.exp(scores[ids]) * np.float32(2.0**WEIGHT_BITS)).astype(np.int64)
        cumulative = weights.cumsum()
        ids = ids[: int(np.searchsorted(cumulative, draw.top_p * float(cumulative[-1]))) + 1]
    return np.sort(ids)
