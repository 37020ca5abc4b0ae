"""From logits to tokens, and to what was asked about them. A row's answer is a function of that row and request alone.

Which token is drawn and how likely one is, `kernels.sampling` says; here requests become draws and numbers become
answers. Log-probabilities are of the raw logits: before penalties, masks, temperature and filters.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.request import PromptToken, SampledToken
from engine.step import Draw
from kernels.backend import Backend
from kernels.sampling import Penalties, TokenDraw


class Likelihood(NamedTuple):
    """How likely a token was, and the likeliest ones, falling, ties to the lower id."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Target(NamedTuple):
    """A prompt's token to score against the logits of the position before, with so many of the likeliest beside it."""

    position: int
    token_id: int
    num_alternatives: int


def sample(logits: Tensor, draws: Sequence[Draw], backend: Backend) -> list[tuple[SampledToken, ...]]:
    """Chooses one token per row and choice.

    logits: [len(draws), vocab_size], float32, on the CPU; not written to. Raises ArithmeticError when a row has a NaN,
    an infinity, or nothing left to choose.
    """
    token_ids = backend.sample(logits, token_draws(draws))
    if all(draw.sampling.num_logprobs is None for draw in draws):
        drawn = iter(token_ids)
        return [tuple([SampledToken(draw.output_index, next(drawn)) for _ in draw.choices]) for draw in draws]
    owners = [(row, draw) for row, draw in enumerate(draws) for _ in draw.choices]
    asked = [
        _Asked(row, token_id, draw.sampling.num_logprobs)
        for (row, draw), token_id in zip(owners, token_ids, strict=True)
    ]
    tokens = iter(zip(token_ids, _likelihoods(logits, asked, backend), strict=True))
    return [tuple(_token(draw.output_index, *next(tokens)) for _ in draw.choices) for draw in draws]


def token_draws(draws: Sequence[Draw]) -> list[TokenDraw]:
    """One for each choice of each draw, from the row of the draw's number."""
    return [_token_draw(row, draw, choice) for row, draw in enumerate(draws) for choice in draw.choices]


def score(logits: Tensor, targets: Sequence[Target], backend: Backend) -> list[PromptToken]:
    """Says how likely each target is under its row.

    logits: [len(targets), vocab_size], as for `sample`. Raises ArithmeticError when a row has a NaN or an infinity.
    """
    asked = [_Asked(row, target.token_id, target.num_alternatives) for row, target in enumerate(targets)]
    return [
        PromptToken(target.position, target.token_id, likelihood.logprob, likelihood.top)
        for target, likelihood in zip(targets, _likelihoods(logits, asked, backend), strict=True)
        if likelihood is not None
    ]


class _Asked(NamedTuple):
    """`num_alternatives` None asks for nothing."""

    row: int
    token_id: int
    num_alternatives: int | None


def _token_draw(row: int, draw: Draw, choice: int) -> TokenDraw:
    sampling, penalties = draw.sampling, None
    if sampling.is_penalised:
        penalties = Penalties(
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            draw.prompt_token_ids,
            draw.output_token_ids,
        )
    return TokenDraw(
        row,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        choice,
        draw.output_index,
        tuple(sampling.stop_token_ids) if draw.output_index < sampling.min_tokens else (),
        penalties,
    )


def _likelihoods(logits: Tensor, asked: Sequence[_Asked], backend: Backend) -> Iterator[Likelihood | None]:
    """One for each of `asked`, None for those that ask for nothing."""
    asking = [part for part in asked if part.num_alternatives is not None]
    if not asking:
        return iter([None] * len(asked))
    rows = torch.tensor([part.row for part in asking])
    token_ids = torch.tensor([part.token_id for part in asking])
    scores = backend.score_tokens(logits, rows, token_ids, max(part.num_alternatives or 0 for part in asking))
    columns = zip(scores.logprobs.tolist(), scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    return (
        None if part.num_alternatives is None else _likelihood(*next(columns), part.num_alternatives) for part in asked
    )


def _likelihood(logprob: float, top_ids: list[int], top_logprobs: list[float], count: int) -> Likelihood:
    return Likelihood(logprob, tuple(zip(top_ids[:count], top_logprobs[:count], strict=True)))


def _token(output_index: int, token_id: int, likelihood: Likelihood | None) -> SampledToken:
    if likelihood is None:
        return SampledToken(output_index, token_id)
    return SampledToken(output_index, token_id, likelihood.logprob, likelihood.top)
