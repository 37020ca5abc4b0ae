"""From logits to tokens. A row's token is a function of its logits, its parameters and its output position alone.

Filters come in the order temperature, top-k, top-p (over what top-k left, renormalised), then one draw by Gumbel noise.
Every tie goes to the lower token id. Log-probabilities are of the raw logits: before temperature, filters and masks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.philox import gumbel
from engine.request import SampledToken
from engine.step import Draw
from kernels.backend import Backend


def _masks_stops(draw: Draw) -> bool:
    """Whether stop tokens are out of the question because `min_tokens` is not reached."""
    return draw.output_index < draw.sampling.min_tokens and bool(draw.sampling.stop_token_ids)


def sample(logits: Tensor, draws: Sequence[Draw], backend: Backend) -> list[tuple[SampledToken, ...]]:
    """Chooses one token per row and choice.

    logits: [len(draws), vocab_size], float32, on the CPU; not written to. Raises ArithmeticError when a row has a NaN,
    an infinity, or nothing left to choose.
    """
    values: NDArray[np.float32] = logits.numpy()
    if len(draws) and not np.isfinite(values.max(axis=1)).all():
        raise ArithmeticError("the model's logits are not finite")
    tokens = np.empty(len(draws), dtype=np.int64)
    greedy = [row for row, draw in enumerate(draws) if draw.sampling.temperature == 0 and not _masks_stops(draw)]
    tokens[greedy] = backend.argmax(logits[greedy]).numpy()
    for row in sorted(set(range(len(draws))).difference(greedy)):
        tokens[row] = _choose(values[row], draws[row])
    asking = [row for row, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]
    logprobs = dict(zip(asking, backend.log_softmax(logits[asking]), strict=True)) if asking else {}
    return [
        (_token(draw, token, logprobs.get(row), backend),)
        for row, (draw, token) in enumerate(zip(draws, tokens.tolist(), strict=True))
    ]


def _choose(logits: NDArray[np.float32], draw: Draw) -> int:
    """Chooses one token of a row. logits: [vocab_size]."""
    sampling = draw.sampling
    scores = logits.astype(np.float64)
    if _masks_stops(draw):
        scores[[token for token in sampling.stop_token_ids if token < len(scores)]] = -np.inf
        if scores.max() == -np.inf:
            raise ArithmeticError("every token is a stop token and min_tokens is not reached")
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores /= sampling.temperature
    kept = _kept(scores, top_k=sampling.top_k, top_p=sampling.top_p)
    noise = gumbel(kept, seed=sampling.seed, choice=draw.choices[0], output_index=draw.output_index)
    return int(kept[(scores[kept] + noise).argmax()])


def _kept(scores: NDArray[np.float64], *, top_k: int, top_p: float) -> NDArray[np.int64]:
    """Ids that the filters keep, rising, at least one. scores: [vocab_size], logits over temperature."""
    if top_k == 0 and top_p == 1.0:
        return np.arange(len(scores))
    ids = largest(scores, top_k or len(scores))
    if top_p < 1.0:
        cumulative = np.exp(scores[ids] - scores[ids[0]]).cumsum()
        ids = ids[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
    return np.sort(ids)


def largest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values (all, when there are fewer), falling; of equals the lower index first.

    values: [n], without NaN.
    """
    candidates = np.arange(len(values))
    if 0 < count < len(values):
        threshold = np.partition(values, -count)[-count]
        candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def _token(draw: Draw, token_id: int, logprobs: Tensor | None, backend: Backend) -> SampledToken:
    """logprobs: [vocab_size], float32."""
    if logprobs is None:
        return SampledToken(draw.output_index, token_id)
    (top,) = backend.largest(logprobs[None], draw.sampling.num_logprobs or 0)
    return SampledToken(
        draw.output_index,
        token_id,
        logprob=float(logprobs[token_id]),
        top_logprobs=tuple(zip(top.tolist(), logprobs[top].tolist(), strict=True)),
    )
