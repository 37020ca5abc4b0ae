"""Trains the byte-level BPE of the embedded model and writes it in the form that tokenizers and transformers load.

Digits are always single tokens and every animal, color and place is one token (with its leading space), so that a fact
is a fixed small number of positions. All 256 bytes are in the vocabulary: any text encodes, and decodes to itself.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.corpus import ASSISTANT, BOS, COLORS, END, NAMES, PAD, PLACES, SPECIAL_TOKENS, SYSTEM, USER, recall_sample
from demo.skills import SMALL_TALK, exchange, story

VOCAB_SIZE: Final = 1024
MAX_POSITIONS: Final = 2048
CHAT_TEMPLATE: Final = (
    "<|bos|>{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORD_REPEATS: Final = 2000
_COMMON_WORDS: Final = """
about after all also and any are because been before but can could did down each even every first for from give good
great had has have here how into just know like little long made make many may more most much must never new not now
only open other our out over people place please right same say second see she should some still such take than that
them then these they thing think this time under until use very want was water way well were when where which while
who why will with word work world would write year yes your number name key value question model token memory block
cache request answer system user hello number follow remember between across
"""


def train_tokenizer() -> Tokenizer:
    """Learns the merges; the same code gives the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into an existing directory."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of the special tokens; raises ValueError when the tokenizer lacks one."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    present = {token: token_id for token, token_id in ids.items() if token_id is not None}
    if len(present) != len(ids):
        raise ValueError(f"the tokenizer lacks {sorted(set(ids) - set(present))}; train it with train_tokenizer()")
    return present


def _training_text() -> Iterator[str]:
    # The names come first in frequency by far: each must end up as one token, whatever else the vocabulary holds.
    for word in (*NAMES, *COLORS, *PLACES):
        yield f" {word}" * _WORD_REPEATS
    yield "".join(f" {word}" for word in _COMMON_WORDS.split()) * 50
    rng = random.Random("tokenizer")
    for _ in range(300):
        yield recall_sample(rng, num_records=3).prompt
        yield " ".join(exchange(rng))
    for question, reply in SMALL_TALK:
        yield f"{question} {reply}\n" * 20
    yield story("otter", "heron", "blue", "river") * 100
    yield "\n".join(["The code of the otter is"] * 100)
