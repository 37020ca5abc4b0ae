"""Prompts as token ids: random ones and natural ones, of any length, the same for the same seed."""

import random
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer

from demo import MODEL_DIR
from demo.corpus import MAX_RECORDS, RecallSample, held_out_recall

MAX_PROMPT_TOKENS: Final = 1500

_FIRST_ORDINARY_ID: Final = 8
_DISTINCT_CHARS: Final = 40
"""More than a first sentence's beginning that two prompts could share by a full block."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and what decides what comes after it."""

    token_ids: tuple[int, ...]
    seed: int


def open_tokenizer() -> Tokenizer:
    """The embedded model's tokenizer."""
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def token_prompts(count: int, *, seed: int, min_tokens: int, max_tokens: int) -> list[Prompt]:
    """`count` prompts of lengths spread evenly from `min_tokens` to `max_tokens`, every second one natural text."""
    rng = random.Random(f"prompts:{seed}")
    tokenizer = open_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    lengths = [min_tokens + (max_tokens - min_tokens) * index // max(1, count - 1) for index in range(count)]
    rng.shuffle(lengths)
    return [
        Prompt(
            tuple(
                _natural_ids(tokenizer, length, seed=seed * 1_000_003 + index)
                if index % 2
                else [rng.randrange(_FIRST_ORDINARY_ID, vocab_size) for _ in range(length)]
            ),
            rng.getrandbits(32),
        )
        for index, length in enumerate(lengths)
    ]


def recall_prompts(count: int, *, seed: int) -> list[RecallSample]:
    """`count` held-out prompts, spread evenly over the numbers of records whose text stays below the longest prompt.

    No two begin with the same block, so that no prefix cache answers for the hand-off.
    """
    tokenizer = open_tokenizer()
    chosen: list[RecallSample] = []
    beginnings: set[str] = set()
    for attempt in range(count * 100):
        num_records = 1 + (MAX_RECORDS - 1) * len(chosen) // max(1, count - 1)
        (sample,) = held_out_recall(
            seed * 1_000_003 + attempt, 1, min_records=num_records, max_records=min(num_records + 2, MAX_RECORDS)
        )
        beginning = sample.prompt[:_DISTINCT_CHARS]
        if beginning in beginnings or len(tokenizer.encode(sample.prompt).ids) > MAX_PROMPT_TOKENS - 8:
            continue
        beginnings.add(beginning)
        chosen.append(sample)
        if len(chosen) == count:
            return chosen
    raise ValueError(f"{count} prompts of up to {MAX_PROMPT_TOKENS} tokens cannot be drawn")


def _natural_ids(tokenizer: Tokenizer, length: int, *, seed: int) -> list[int]:
    ids: list[int] = []
    for sample in held_out_recall(seed, 1 + length // 20, min_records=1, max_records=20):
        ids += tokenizer.encode(sample.prompt + " ", add_special_tokens=False).ids
        if len(ids) >= length:
            break
    return ids[:length]
