"""Composes the training documents of the embedded model: chats and plain texts with a loss weight per piece.

Codes cannot be predicted where they are first stated, so those tokens weigh nothing; every reply after the facts does.
Many questions follow one set of facts, which makes the share of tokens that teach recall as large as it can be.
"""

import random
from typing import Final

from demo.corpus import (
    ASSISTANT,
    BOS,
    COLORS,
    END,
    MAX_RECORDS,
    NAMES,
    PLACES,
    SYSTEM,
    USER,
    Piece,
    Record,
    draw_record,
    draw_records,
    question,
    state_facts,
)
from demo.skills import exchange, tell

Document = list[Piece]

LOOKUP_WEIGHT: Final = 4.0
"""The weight of a token that only a look-up in the context can predict; accuracy is measured on these."""

_RECORD_TOKENS: Final = 12
_DISTRACTOR_TOKENS: Final = 8
_QUESTION_TOKENS: Final = 16
_FRAME_TOKENS: Final = 12
_TEXT_WEIGHT: Final = 0.02
_EASY_WEIGHT: Final = 0.2
_END_WEIGHT: Final = 0.5
_STORY_WEIGHT: Final = 0.2
_PAIR_WEIGHT: Final = 2.0
_REPLY_CHARACTERS: Final = 80

NOTED: Final = "Noted."
"""The reply to a message that states facts and asks nothing."""

UNKNOWN: Final = "I do not know."
"""The reply to a question about a name of which nothing was stated."""

_UNKNOWN_PIECES: Final = (Piece(UNKNOWN[0], LOOKUP_WEIGHT), Piece(UNKNOWN[1:], _EASY_WEIGHT))
_OTHER_QUESTIONS: Final = (
    "What's the code of the {name}?",
    "Tell me the code of the {name}.",
    "Which code does the {name} have?",
    "code of the {name}?",
)
_SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a tiny model.",
    "Answer the question.",
    "Answer briefly.",
    "Be helpful and precise.",
)
_VALUES: Final = (*NAMES, *COLORS, *PLACES)


def recall_document(rng: random.Random, max_tokens: int) -> Document:
    """Composes facts and questions on them, about as long as ``max_tokens`` (at least 48; the rest is cut off)."""
    fact_share = rng.choice((rng.uniform(0.45, 0.65), rng.uniform(0.45, 0.95)))
    distractors_per_record = rng.choice((0.0, 0.25, 0.5, 1.0, 3.0))
    fact_tokens = fact_share * (max_tokens - _FRAME_TOKENS - _QUESTION_TOKENS)
    num_records = int(fact_tokens / (_RECORD_TOKENS + distractors_per_record * _DISTRACTOR_TOKENS))
    num_records = max(1, min(num_records, MAX_RECORDS))
    records = draw_records(rng, num_records, held_out=False)
    num_distractors = max(0, int((fact_tokens - num_records * _RECORD_TOKENS) / _DISTRACTOR_TOKENS))
    sentences, colors = state_facts(rng, records, min(num_distractors, int(num_records * 3) + 1))
    num_questions = max(1, int((max_tokens - _FRAME_TOKENS - fact_tokens) / _QUESTION_TOKENS))
    asked = rng.sample(records, min(num_questions, num_records))
    return _plain(rng, sentences, asked) if rng.random() < 0.35 else _chat(rng, sentences, records, asked, colors)


def drill_document(rng: random.Random, max_tokens: int) -> Document:
    """Composes the bare form of recall: words, then the same words again in another order, dense with look-ups.

    From these, attention learns early in training to find what followed a word before.
    """
    form = rng.random()
    if form < 0.3:
        return _drill_runs(rng, max(4, min(len(NAMES), max_tokens // 2 - 1)))
    if form < 0.6:
        return _drill_pairs(rng, max(2, min(len(NAMES), max_tokens // 4 - 1)))
    return _drill_codes(rng, max(2, min(MAX_RECORDS, max_tokens // 12 - 1)))


def skills_document(rng: random.Random, num_exchanges: int) -> Document:
    """Composes a chat of exchanges from the lesser skills, or now and then a story as plain text."""
    if rng.random() < 0.06:
        return [Piece(BOS, 0.0), Piece(tell(rng), _STORY_WEIGHT)]
    pieces = [Piece(BOS, 0.0), *_system(rng)]
    names = rng.sample(NAMES, len(NAMES))
    for _ in range(num_exchanges):
        kind = rng.random()
        if kind < 0.04:
            pieces += _turn(question(names.pop()), *_UNKNOWN_PIECES)
        elif kind < 0.08:
            num_records = rng.randint(1, 8)
            pieces += _facts_with_list([draw_record(rng, names.pop(), held_out=False) for _ in range(num_records)])
        else:
            pieces += _exchange(rng)
    return pieces


def _drill_runs(rng: random.Random, num_words: int) -> Document:
    """Words, then the same words with runs of them exchanged: within a run each word follows from the one before."""
    words = rng.sample(NAMES, num_words)
    pieces = [Piece(BOS, 0.0), Piece("".join(f" {word}" for word in words), 0.0)]
    cuts = sorted(rng.sample(range(1, len(words)), len(words) // 4))
    runs = [words[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(words)], strict=True)]
    for run in rng.sample(runs, len(runs)):
        pieces += [Piece(f" {run[0]}", 0.0), Piece("".join(f" {word}" for word in run[1:]), 1.0)]
    return pieces


def _drill_pairs(rng: random.Random, num_pairs: int) -> Document:
    """Pairs of words, then the same pairs in another order."""
    values = [rng.choice(_VALUES) for _ in range(num_pairs)]
    pairs = list(zip(rng.sample(NAMES, num_pairs), values, strict=True))
    pieces = [Piece(BOS, 0.0), *(Piece(f" {name} {value}", 0.0) for name, value in pairs)]
    for name, value in rng.sample(pairs, num_pairs):
        pieces += [Piece(f" {name}", 0.0), Piece(f" {value}", _PAIR_WEIGHT)]
    return pieces


def _drill_codes(rng: random.Random, num_records: int) -> Document:
    """Words with their codes, then the same in another order."""
    records = draw_records(rng, num_records, held_out=False)
    pieces = [Piece(BOS, 0.0), *(Piece(f" {name} {code}", 0.0) for name, code in records)]
    for name, code in rng.sample(records, num_records):
        pieces += [Piece(f" {name} ", 0.0), *_code(code)]
    return pieces


def _exchange(rng: random.Random) -> Document:
    """One exchange of the lesser skills; a very long reply weighs no more than a long one, lest stories drown sums."""
    asked, reply = exchange(rng)
    return _turn(asked, Piece(reply, min(1.0, _REPLY_CHARACTERS / len(reply))))


def _facts_with_list(records: list[Record]) -> Document:
    """A few codes, and the wish to have them said again, in the same order."""
    facts = " ".join(record.sentence for record in records)
    return _turn(f"{facts} List the codes.", Piece(facts, _STORY_WEIGHT))


def _code(code: str) -> Document:
    """The first digit takes the look-up; the others follow from where it was found."""
    return [Piece(code[0], LOOKUP_WEIGHT), Piece(code[1:], 1.0)]


def _turn(question: str, *reply: Piece | str) -> Document:
    """One question and its reply; a reply given as text weighs 1 per token."""
    return [
        Piece(USER, 0.0),
        Piece(question, 0.0),
        Piece(END, 0.0),
        Piece(ASSISTANT, 0.0),
        *(Piece(part, 1.0) if isinstance(part, str) else part for part in reply),
        Piece(END, _END_WEIGHT),
    ]


def _chat(
    rng: random.Random, facts: list[str], records: list[Record], asked: list[Record], colors: dict[str, str]
) -> Document:
    """Facts, then questions turn by turn; where the facts stand is one of three forms."""
    form = rng.random()
    pieces = [Piece(BOS, 0.0)]
    lead = ""
    joint = "\n" if rng.random() < 0.1 else " "
    stated = {record.name for record in records}
    unknown = [name for name in NAMES if name not in stated]
    if form < 0.15:
        pieces += [Piece(SYSTEM, 0.0), Piece(joint.join(facts), 0.0), Piece(END, 0.0)]
    else:
        pieces += _system(rng)
        messages = _split(rng, facts) if form < 0.35 else [facts]
        for message in messages[:-1]:
            pieces += _turn(joint.join(message), Piece(NOTED, _EASY_WEIGHT))
        lead = joint.join(messages[-1]) + joint
    for record in asked:
        kind = rng.random()
        if kind < 0.1 and colors:
            name = rng.choice(list(colors))
            pieces += _turn(f"{lead}What is the color of the {name}?", Piece(colors[name], LOOKUP_WEIGHT))
        elif kind < 0.13:
            pieces += _turn(lead + _question(rng, rng.choice(unknown)), *_UNKNOWN_PIECES)
        elif kind < 0.16 and not lead:
            pieces += _exchange(rng)
        else:
            pieces += _turn(lead + _question(rng, record.name), *_code(record.code))
        lead = ""
    return pieces


def _split(rng: random.Random, facts: list[str]) -> list[list[str]]:
    """Cuts the facts into up to four messages; none is empty."""
    cuts = sorted(rng.sample(range(1, len(facts)), min(len(facts) - 1, rng.randint(1, 3))))
    return [facts[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(facts)], strict=True)]


def _question(rng: random.Random, name: str) -> str:
    return question(name) if rng.random() < 0.85 else rng.choice(_OTHER_QUESTIONS).format(name=name)


def _system(rng: random.Random) -> Document:
    if rng.random() < 0.85:
        return []
    return [Piece(SYSTEM, 0.0), Piece(rng.choice(_SYSTEM_PROMPTS), 0.0), Piece(END, 0.0)]


def _plain(rng: random.Random, facts: list[str], asked: list[Record]) -> Document:
    """Facts, then the asked ones stated again, with or without the question before; no chat tokens but the first."""
    pieces = [Piece(BOS, 0.0), Piece(" ".join(facts), _TEXT_WEIGHT)]
    with_question = rng.random() < 0.5
    for record in asked:
        if with_question:
            pieces.append(Piece(f" {record.question}", _TEXT_WEIGHT))
        pieces += [
            Piece(f" The code of the {record.name} is ", _TEXT_WEIGHT),
            *_code(record.code),
            Piece(".", _EASY_WEIGHT),
        ]
    return pieces
