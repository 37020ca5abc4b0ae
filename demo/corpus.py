"""Seeded text generators for the embedded model: recall from context, and where the training/held-out border runs.

A recall text states facts ("The code of the otter is 7341.") among distractors and asks for some of them. Every
(name, code) pair falls by a checksum into one of two classes: training texts state pairs of one class only, held-out
prompts pairs of the other only, so that no held-out record was ever seen in training. Pure Python: no tensor library is
imported here.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

BOS: Final = "<|bos|>"
END: Final = "<|end|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SYSTEM: Final = "<|system|>"
PAD: Final = "<|pad|>"
SPECIAL_TOKENS: Final = (PAD, BOS, END, USER, ASSISTANT, SYSTEM)

_NAMES: Final = """
ant ape badger bat bear beaver bee boar bull camel cat cobra cod colt cow crab crane crow deer dingo dog dove duck
eagle eel elk emu ewe falcon fawn ferret finch flea fly foal fox frog gecko gnat goat goose gull hare hawk hen heron
hornet horse hyena ibis jackal jay kite kiwi koala lamb lark lion lizard llama loon lynx magpie mantis marmot mink
mole monkey moose moth mouse mule newt orca osprey otter owl ox oyster panda parrot pig pigeon pike pony puma python
quail rabbit ram rat raven rhino robin rook salmon seal shark sheep shrew skunk slug snail snake spider squid stork
swan swift tern tiger toad trout tuna turkey turtle viper vole walrus wasp weasel whale wolf wombat worm wren yak
zebra
"""
NAMES: Final = tuple(_NAMES.split())
COLORS: Final = ("red", "blue", "green", "black", "white", "brown", "gray", "yellow", "pink", "golden")
PLACES: Final = (
    "river", "forest", "lake", "hill", "road", "bridge", "mill", "barn", "garden", "tower", "harbor", "meadow",
)  # fmt: skip

MAX_RECORDS: Final = 110
"""More records than this would not fit, with their distractors, into the longest context of training."""

_NUM_CODES: Final = 10_000
_HELD_OUT_CLASSES: Final = 8


class Piece(NamedTuple):
    """A run of text and the weight with which predicting each of its tokens counts in the loss.

    A piece is either exactly one special token or contains none, and pieces are cut only where the tokenizer cuts too.
    """

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class RecallSample:
    """A user message that states records and asks for one of them, and the exact reply expected."""

    prompt: str
    answer: str


class Record(NamedTuple):
    """One stated code."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """The one form in which a record is ever stated."""
        return f"The code of the {self.name} is {self.code}."

    @property
    def question(self) -> str:
        """The form in which recall is measured."""
        return question(self.name)


def is_held_out(name: str, code: str) -> bool:
    """Whether the pair belongs to the class (one in eight) that training never states."""
    return zlib.crc32(f"{name}:{code}".encode()) % _HELD_OUT_CLASSES == 0


def recall_sample(rng: random.Random, *, num_records: int) -> RecallSample:
    """Draws a recall prompt from the training class.

    num_records: 1 to ``MAX_RECORDS``; a prompt is 12 to 17 tokens per record, and 100 records may exceed 1,600 tokens,
    the longest context of training. Raises ValueError outside of that.
    """
    return _sample(rng, num_records=num_records, held_out=False)


def held_out_recall(seed: int, count: int, *, min_records: int, max_records: int) -> list[RecallSample]:
    """Draws ``count`` prompts none of whose records occurs in a training text; a seed always gives the same prompts."""
    rng = random.Random(f"held-out:{seed}")
    return [_sample(rng, num_records=rng.randint(min_records, max_records), held_out=True) for _ in range(count)]


def question(name: str) -> str:
    """Asks for the code of a name."""
    return f"What is the code of the {name}?"


def draw_record(rng: random.Random, name: str, *, held_out: bool) -> Record:
    """Draws a code for the name such that the pair is of the given class."""
    while True:
        code = f"{rng.randrange(_NUM_CODES):04d}"
        if is_held_out(name, code) == held_out:
            return Record(name, code)


def draw_records(rng: random.Random, num_records: int, *, held_out: bool) -> list[Record]:
    """Draws records with distinct names, all of one class."""
    if not 1 <= num_records <= len(NAMES):
        raise ValueError(f"num_records must be between 1 and {len(NAMES)}, got {num_records}")
    return [draw_record(rng, name, held_out=held_out) for name in rng.sample(NAMES, num_records)]


class Facts(NamedTuple):
    """Sentences in the order in which they are stated, and the color of each name of which one is stated."""

    sentences: list[str]
    colors: dict[str, str]


def state_facts(rng: random.Random, records: Sequence[Record], num_distractors: int) -> Facts:
    """States the records among at most ``num_distractors`` other sentences, shuffled.

    At most one color and one home is stated of a name, so that every question about a color has one answer.
    """
    sentences = [record.sentence for record in records]
    colors: dict[str, str] = {}
    homes: set[str] = set()
    for _ in range(num_distractors):
        name = rng.choice(NAMES)
        if rng.random() < 0.5:
            if name not in colors:
                colors[name] = rng.choice(COLORS)
                sentences.append(f"The color of the {name} is {colors[name]}.")
        elif name not in homes:
            homes.add(name)
            sentences.append(f"The {name} lives near the {rng.choice(PLACES)}.")
    rng.shuffle(sentences)
    return Facts(sentences, colors)


def _sample(rng: random.Random, *, num_records: int, held_out: bool) -> RecallSample:
    if not 1 <= num_records <= MAX_RECORDS:
        raise ValueError(f"num_records must be between 1 and {MAX_RECORDS}, got {num_records}")
    records = draw_records(rng, num_records, held_out=held_out)
    sentences = state_facts(rng, records, rng.randint(0, num_records // 2 + 1)).sentences
    asked = rng.choice(records)
    return RecallSample(prompt=" ".join([*sentences, asked.question]), answer=asked.code)
