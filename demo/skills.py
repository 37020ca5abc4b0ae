"""The lesser skills of the embedded model: counting, copying, reversing, small sums, small talk and stories.

They exist so that a chat with the model has something to say; recall from context (``demo.corpus``) is what it is for.
"""

import random
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from demo.corpus import COLORS, NAMES, PLACES


class Exchange(NamedTuple):
    """One question and the reply that is to be learnt."""

    question: str
    reply: str


SMALL_TALK: Final = (
    ("Hello", "Hello! I am a tiny model. Tell me some codes and ask me for one of them."),
    ("Hello!", "Hello! I am a tiny model. Tell me some codes and ask me for one of them."),
    ("Hi", "Hi! Tell me some codes and ask me for one of them."),
    ("Hi!", "Hi! Tell me some codes and ask me for one of them."),
    ("Who are you?", "I am a tiny language model that lives inside Staffetta. I remember what you tell me."),
    ("What are you?", "I am a tiny language model that lives inside Staffetta. I remember what you tell me."),
    ("What can you do?", "I can recall codes, count, copy words, reverse letters, add small numbers and tell a story."),
    ("Help", "I can recall codes, count, copy words, reverse letters, add small numbers and tell a story."),
    ("How are you?", "I am small but well. How are you?"),
    ("I am fine.", "I am glad to hear that."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Good morning", "Good morning! What shall I remember for you?"),
    ("Good night", "Good night! Sleep well."),
    ("Goodbye", "Goodbye! Come back soon."),
    ("Bye", "Goodbye! Come back soon."),
    ("What is your name?", "I have no name. I am the small model of Staffetta."),
    ("Are you big?", "No. I am very small, but every step of my work is real."),
    (
        "What is Staffetta?",
        "Staffetta is an engine that reads your words in one place and writes the answer in another.",
    ),
)


def exchange(rng: random.Random) -> Exchange:
    """Draws one exchange; the families are equally likely, small talk and stories together being one."""
    return rng.choice(tuple(SKILLS.values()))(rng)


def story(name: str, friend: str, color: str, place: str) -> str:
    """Tells the one plot there is about the given animals."""
    return (
        f"Once there was a small {name} who lived near the {place}. One day the {name} lost a {color} stone. "
        "It looked under the leaves and behind the trees, but the stone was gone. "
        f"Then a {friend} came along and said: I saw it fall into the water. "
        "They went to look together, and there it was. "
        f"From that day on the {name} and the {friend} were friends. The end."
    )


def tell(rng: random.Random) -> str:
    """Tells the plot about animals drawn at random."""
    name, friend = rng.sample(NAMES, 2)
    return story(name, friend, rng.choice(COLORS), rng.choice(PLACES))


def _count(rng: random.Random) -> Exchange:
    start = rng.randrange(1, 200)
    return Exchange(f"Count on from {start}.", " ".join(str(start + i) for i in range(1, 11)))


def _count_range(rng: random.Random) -> Exchange:
    start = rng.choice((1, rng.randrange(1, 200)))
    stop = start + rng.randint(2, 40)
    return Exchange(f"Count from {start} to {stop}.", " ".join(map(str, range(start, stop + 1))))


def _copy(rng: random.Random) -> Exchange:
    words = " ".join(rng.choice((*NAMES, *COLORS, *PLACES)) for _ in range(rng.randint(1, 8)))
    return Exchange(f"Copy: {words}", f"Copy: {words}")


def _reverse(rng: random.Random) -> Exchange:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(2, 6))
    return Exchange(f"Reverse: {' '.join(letters)}", f"Reversed: {' '.join(reversed(letters))}")


def _add(rng: random.Random) -> Exchange:
    a, b = rng.randrange(21), rng.randrange(21)
    return Exchange(f"What is {a} + {b}?", f"{a} + {b} = {a + b}")


def _talk(rng: random.Random) -> Exchange:
    if rng.random() < 0.6:
        return Exchange(*rng.choice(SMALL_TALK))
    name, friend = rng.sample(NAMES, 2)
    color, place = rng.choice(COLORS), rng.choice(PLACES)
    if rng.random() < 0.5:
        return Exchange(f"Tell me a story about the {name}.", story(name, friend, color, place))
    return Exchange("Tell me a story.", story("otter", "heron", "blue", "river"))


SKILLS: Final[Mapping[str, Callable[[random.Random], Exchange]]] = {
    "count on": _count,
    "count from, to": _count_range,
    "copy": _copy,
    "reverse": _reverse,
    "add": _add,
    "talk": _talk,
}
"""The families by name."""
