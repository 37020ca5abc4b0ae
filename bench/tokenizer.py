"""A tokenizer of any size for models without training data: every id below the vocabulary's size has a text.

Byte-level BPE whose merges spell all short words over a to z, with and without a blank before them: any text encodes
and decodes to itself, and a random id is nearly always a whole piece of text, as in trained vocabularies.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS: Final = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
"""In the order of their ids."""
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_BYTES: Final = 256
FIRST_WORD_ID: Final = len(SPECIAL_TOKENS) + NUM_BYTES
"""Ids from here on are words of at least two characters, the blank included."""

_BLANK: Final = "\u0120"
"""How the byte-level alphabet writes a blank."""


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with ids 0 to vocab_size - 1, the special tokens first, then the bytes, then words.

    Raises ValueError for a size that has no room for special tokens and bytes.
    """
    if vocab_size < FIRST_WORD_ID:
        raise ValueError(f"vocab_size is {vocab_size}, needs at least {FIRST_WORD_ID}")
    merges = list(islice(_merges(), vocab_size - FIRST_WORD_ID))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges))
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path, *, max_positions: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, with the chat template, into an existing directory."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    pad, bos, eos, *roles = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "additional_special_tokens": roles,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merges() -> Iterator[tuple[str, str]]:
    """Endless: every word of a length, then those one letter longer, each from a shorter word and its last letter."""
    words = [_BLANK, *ascii_lowercase]
    while True:
        pairs = [(word, letter) for word in words for letter in ascii_lowercase]
        yield from pairs
        words = [word + letter for word, letter in pairs]
