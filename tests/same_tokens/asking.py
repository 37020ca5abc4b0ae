"""Requests of every kind, and the bits of their answers: what a system-level proof sends and compares."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

from tests.e2e.answers import Answer
from tests.e2e.prompts import token_prompts
from tests.e2e.reflected import ReflectedClient

SHORT_PROMPT_TOKENS: Final = 150


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `sampling` has every field set that a started request needs, so that it may go to a worker too."""

    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    cut: int
    """A place inside the prompt, from 1 to its length."""
    num_before_restart: int
    """Generated tokens after which a restarted request goes on, at least one, and at least one is left."""

    @property
    def max_tokens(self) -> int:
        """How many tokens the answer has."""
        return cast(int, self.sampling["max_tokens"])

    def __str__(self) -> str:
        kind = f"seeded {self.sampling['seed']}" if self.sampling["temperature"] else "greedy"
        return f"{len(self.token_ids)} prompt tokens, {kind}"


class TokenBits(NamedTuple):
    """One token. Log-probabilities as `float.hex` writes them: equal text is equal bits, the sign of 0 included."""

    token_id: int
    logprob: str
    top_logprobs: tuple[tuple[int, str], ...]


def draw_requests(count: int, *, seed: int, max_prompt_tokens: int) -> list[Asked]:
    """`count` requests over prompts of 1 to `max_prompt_tokens` tokens, every second one short, about half seeded."""
    rng = random.Random(f"requests:{seed}")
    prompts = token_prompts(count // 2, seed=2 * seed, min_tokens=1, max_tokens=SHORT_PROMPT_TOKENS)
    prompts += token_prompts(count - count // 2, seed=2 * seed + 1, min_tokens=1, max_tokens=max_prompt_tokens)
    rng.shuffle(prompts)
    drawn = []
    for prompt in prompts:
        is_seeded = rng.random() < 0.5
        max_tokens = rng.randint(16, 24)
        sampling = {
            "temperature": rng.uniform(0.7, 1.2) if is_seeded else 0.0,
            "top_k": rng.choice((0, 5, 50)) if is_seeded else 0,
            "top_p": rng.choice((1.0, 0.95, 0.7)) if is_seeded else 1.0,
            "seed": prompt.seed,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "logprobs": rng.randint(0, 5),
        }
        drawn.append(
            Asked(prompt.token_ids, sampling, rng.randint(1, len(prompt.token_ids)), rng.randint(1, max_tokens - 1))
        )
    return drawn


async def ask(client: ReflectedClient, asked: Asked) -> Answer:
    """The request as it is. Raises AssertionError when its answer is not as long as it has to be."""
    prompt = {"token_ids": asked.token_ids}
    answer = await client.generate(timeout_s=300.0, tokens=prompt, sampling=asked.sampling)
    assert len(answer.token_ids) == asked.max_tokens, f"{asked}: the answer ended early: {answer}"
    return answer


async def ask_after_its_beginning(client: ReflectedClient, asked: Asked) -> Answer:
    """The request after another one for the beginning of its prompt: a partial prefix hit where a block is full."""
    await client.generate(tokens={"token_ids": asked.token_ids[: asked.cut]}, sampling=_TWO_TOKENS)
    return await ask(client, asked)


async def ask_again(client: ReflectedClient, asked: Asked) -> Answer:
    """The request after another one for its whole prompt: a prefix hit over every block that can be one."""
    await client.generate(tokens={"token_ids": asked.token_ids}, sampling=_TWO_TOKENS)
    return await ask(client, asked)


_TWO_TOKENS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
"""The first token comes from where the prompt was computed; KV is handed over for the second."""


def bits_of(answer: Answer) -> tuple[TokenBits, ...]:
    """Every token of an answer that has a log-probability for each."""
    rows = zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True)
    return tuple(make_bits(token_id, logprob, top) for token_id, logprob, top in rows)


def make_bits(token_id: int, logprob: float, top: Iterable[tuple[int, float]]) -> TokenBits:
    """One token."""
    return TokenBits(token_id, logprob.hex(), tuple((other, value.hex()) for other, value in top))


def first_difference(
    requests: Sequence[Asked],
    actual: Sequence[Sequence[TokenBits]],
    expected: Sequence[Sequence[TokenBits]],
) -> str | None:
    """The first place where two runs of the same requests differ, in words; None where there is none.

    An output that is shorter than the expected one is the end of it: what a restarted request brought.
    """
    for number, (asked, got, whole) in enumerate(zip(requests, actual, expected, strict=True)):
        first = len(whole) - len(got)
        if not got or first < 0:
            return f"request {number} ({asked}): {len(got)} tokens instead of {len(whole)}"
        for index, (token, other) in enumerate(zip(got, whole[first:], strict=True), start=first):
            if token != other:
                return f"request {number} ({asked}), token {index}: {tuple(token)} instead of {tuple(other)}"
    return None
