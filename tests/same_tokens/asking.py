"""Requests of every kind, and the ways of putting them to a gateway: what the system-level proof sends."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, cast

from tests.e2e.reflected import Choices, ReflectedClient

SHORT_PROMPT_TOKENS: Final = 150
MAX_PROMPT_TOKENS: Final = 1500

_FIRST_ORDINARY_ID: Final = 8
_NUM_STOPS: Final = 40
"""Stop ids of a request that has some: enough for most answers of a small vocabulary to meet one."""
_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `sampling` has every field set that a started request needs, so that it may go to a worker too."""

    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    cut: int
    """A place inside the prompt, from 1 to its length."""
    restart_at: tuple[float, ...]
    """For each choice the share of its tokens after which a restart goes on, from 0 to 1."""

    @property
    def num_choices(self) -> int:
        """How many continuations are wanted."""
        return cast(int, self.sampling["n"])

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest."""
        return not self.sampling["temperature"]

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of the prompt are wanted: then no prefix hit may be taken."""
        return "prompt_logprobs" in self.sampling

    def __str__(self) -> str:
        kinds = [f"{len(self.token_ids)} prompt tokens", f"{self.num_choices} choices"]
        kinds.append(f"seed {self.sampling['seed']}" if self.sampling["temperature"] else "greedy")
        kinds += [name for name in _PENALTIES if name in self.sampling]
        return ", ".join([*kinds, "stop ids"] if self.sampling["stop_token_ids"] else kinds)


class Draws(Enum):
    """How the tokens of streams are drawn."""

    GREEDY = "greedy"
    SEEDED = "seeded"
    BOTH = "greedy and seeded"


class Streams(NamedTuple):
    """Requests that are put so many at a time, and ask for tokens alone: those of some that are drawn in a way."""

    draws: Draws
    num_at_once: int

    def are(self, asked: Asked) -> bool:
        """Whether a request is one of them."""
        return self.draws is Draws.BOTH or asked.is_greedy == (self.draws is Draws.GREEDY)

    def __str__(self) -> str:
        return f"tokens alone, {self.draws.value}, {self.num_at_once} at a time"


STREAMS: Final = (
    *(Streams(Draws.GREEDY, num_at_once) for num_at_once in (1, 2, 3, 4, 16)),
    Streams(Draws.SEEDED, 4),
    Streams(Draws.BOTH, 4),
    Streams(Draws.BOTH, 16),
)


def draw_requests(count: int, *, seed: int, vocab_size: int, max_prompt_tokens: int = MAX_PROMPT_TOKENS) -> list[Asked]:
    """`count` requests over prompts of 1 to `max_prompt_tokens` tokens, every second one short.

    Every kind is drawn on its own, so that all combinations occur: seeded with filters or greedy, one to four choices,
    each of the penalties, stop ids with a least length, the prompt's log-probabilities.
    """
    rng = random.Random(f"requests:{seed}")
    lengths = [*_spread(count // 2, SHORT_PROMPT_TOKENS), *_spread(count - count // 2, max_prompt_tokens)]
    rng.shuffle(lengths)
    return [_draw(rng, length, vocab_size) for length in lengths]


def draw_streams(count: int, *, seed: int, vocab_size: int) -> list[Asked]:
    """`count` requests whose next token depends on their logits alone, every second one greedy, over short prompts.

    Without their log-probabilities their steps are begun ahead. Greedy ones have one choice: others would be equal.
    """
    rng = random.Random(f"streams:{seed}")
    lengths = _spread(count, SHORT_PROMPT_TOKENS)
    rng.shuffle(lengths)
    return [_draw_stream(rng, length, vocab_size, is_seeded=number % 2 > 0) for number, length in enumerate(lengths)]


def _draw_stream(rng: random.Random, length: int, vocab_size: int, *, is_seeded: bool) -> Asked:
    ordinary = range(_FIRST_ORDINARY_ID, vocab_size)
    num_choices = rng.choice((1, 1, 1, 2)) if is_seeded else 1
    sampling = {
        **_filters(rng, is_seeded=is_seeded),
        "seed": rng.getrandbits(64),
        "n": num_choices,
        "max_tokens": rng.randint(8, 40),
        "min_tokens": rng.randint(0, 3),
        "stop_token_ids": rng.sample(ordinary, _NUM_STOPS) if rng.random() < 0.2 else [],
        "ignore_eos": rng.random() < 0.5,
        "logprobs": 0,
    }
    shares = tuple(rng.random() for _ in range(num_choices))
    return Asked(tuple(rng.choices(ordinary, k=length)), sampling, rng.randint(1, length), shares)


def _filters(rng: random.Random, *, is_seeded: bool) -> dict[str, Any]:
    return {
        "temperature": rng.uniform(0.7, 1.3) if is_seeded else 0.0,
        "top_k": rng.choice((0, 5, 50)) if is_seeded else 0,
        "top_p": rng.choice((1.0, 0.95, 0.7)) if is_seeded else 1.0,
    }


def _spread(count: int, longest: int) -> list[int]:
    return [1 + (longest - 1) * index // max(1, count - 1) for index in range(count)]


def _draw(rng: random.Random, length: int, vocab_size: int) -> Asked:
    ordinary = range(_FIRST_ORDINARY_ID, vocab_size)
    # A prompt of few distinct tokens, as every second one is, gives the penalty for repetition something to count.
    words: Sequence[int] = ordinary if rng.random() < 0.5 else rng.sample(ordinary, 20)
    is_seeded = rng.random() < 0.6
    num_logprobs = rng.randint(0, 4)
    max_tokens = rng.randint(3, 16)
    sampling = {
        **_filters(rng, is_seeded=is_seeded),
        "seed": rng.getrandbits(64),
        "n": rng.choice((1, 1, 2, 3, 4)),
        "max_tokens": max_tokens,
        "min_tokens": rng.randint(0, 3),
        "stop_token_ids": rng.sample(ordinary, _NUM_STOPS) if rng.random() < 0.4 else [],
        "ignore_eos": rng.random() < 0.5,
        "logprobs": num_logprobs,
    }
    sampling |= {name: rng.uniform(*bounds) for name, bounds in _PENALTIES.items() if rng.random() < 0.3}
    if rng.random() < 0.2:
        sampling["prompt_logprobs"] = num_logprobs
    shares = tuple(rng.random() for _ in range(cast(int, sampling["n"])))
    return Asked(tuple(rng.choices(words, k=length)), sampling, rng.randint(1, length), shares)


_PENALTIES: Final = {
    "repetition_penalty": (0.7, 1.8),
    "presence_penalty": (-1.5, 1.5),
    "frequency_penalty": (-1.0, 1.0),
}
"""Each with the bounds between which it is drawn."""


async def ask(client: ReflectedClient, asked: Asked) -> Choices:
    """The request as it is."""
    prompt = {"token_ids": asked.token_ids}
    return await client.generate_choices(timeout_s=_TIMEOUT_S, tokens=prompt, sampling=asked.sampling)


async def ask_for_tokens(client: ReflectedClient, asked: Asked) -> Choices:
    """The request without its log-probabilities."""
    sampling = {name: value for name, value in asked.sampling.items() if name not in ("logprobs", "prompt_logprobs")}
    prompt = {"token_ids": asked.token_ids}
    return await client.generate_choices(timeout_s=_TIMEOUT_S, tokens=prompt, sampling=sampling)


async def ask_after_its_beginning(client: ReflectedClient, asked: Asked) -> Choices:
    """The request after another one for the beginning of its prompt: a partial prefix hit where a block is full."""
    await client.generate(tokens={"token_ids": asked.token_ids[: asked.cut]}, sampling=_TWO_TOKENS)
    return await ask(client, asked)


async def ask_again(client: ReflectedClient, asked: Asked) -> Choices:
    """The request after another one for its whole prompt: a prefix hit over every block that can be one."""
    await client.generate(tokens={"token_ids": asked.token_ids}, sampling=_TWO_TOKENS)
    return await ask(client, asked)


_TWO_TOKENS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
"""The first token comes from where the prompt was computed; KV is handed over for the second."""
