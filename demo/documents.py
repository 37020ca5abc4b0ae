"""Composes the training documents of the embedded model: chats and plain texts with a loss weight per piece.

Codes cannot be predicted where they are first stated, so those tokens weigh nothing; every question after the facts does.
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
    draw_records,
    state_facts,
)
from demo.skills import exchange

Document = list[Piece]

LOOKUP_WEIGHT: Final = 4.0
"""The weight of a token that only a look-up in the context can predict; accuracy is measured on these."""

_RECORD_TOKENS: Final = 12
_DISTRACTOR_TOKENS: Final = 8
_QUESTION_TOKENS: Final = 16
_FRAME_TOKENS: Final = 12
_TEXT_WEIGHT: Final = 0.02
_EASY_WEIGHT: Final = 0.2
_VALUES: Final = (*NAMES, *COLORS, *PLACES)


def recall_document(rng: random.Random, max_tokens: int) -> Document:
    """Composes one text about as long as ``max_tokens`` (at least 48; a caller truncates what is over) that teaches recall."""
    fact_share = rng.choice((rng.uniform(0.45, 0.65), rng.uniform(0.45, 0.95)))
    distractors_per_record = rng.choice((0.0, 0.25, 0.5, 1.0, 3.0))
    fact_tokens = fact_share * (max_tokens - _FRAME_TOKENS - _QUESTION_TOKENS)
    num_records = int(fact_tokens / (_RECORD_TOKENS + distractors_per_record * _DISTRACTOR_TOKENS))
    num_records = max(1, min(num_records, MAX_RECORDS))
    records = draw_records(rng, num_records, held_out=False)
    num_distractors = max(0, int((fact_tokens - num_records * _RECORD_TOKENS) / _DISTRACTOR_TOKENS))
    sentences, colors = state_facts(rng, records, min(num_distractors, int(num_records * 3) + 1))
    facts = ("\n" if rng.random() < 0.1 else " ").join(sentences)
    num_questions = max(1, int((max_tokens - _FRAME_TOKENS - fact_tokens) / _QUESTION_TOKENS))
    asked = rng.sample(records, min(num_questions, num_records))
    return _plain(rng, facts, asked) if rng.random() < 0.35 else _chat(rng, facts, asked, colors)


def drill_document(rng: random.Random, max_tokens: int) -> Document:
    """Composes the bare form of recall: keys and their values, then the same pairs again in another order.

    Values are codes or, half of the time, single words: the second half is dense with look-ups, from which attention learns
    early in training to find what followed a word before.
    """
    pieces = [Piece(BOS, 0.0)]
    form = rng.random()
    if form < 0.3:
        words = rng.sample(NAMES, max(4, min(len(NAMES), max_tokens // 2 - 1)))
        pieces += [Piece("".join(f" {word}" for word in words), 0.0)]
        cuts = sorted(rng.sample(range(1, len(words)), len(words) // 4))
        runs = [words[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(words)], strict=True)]
        for run in rng.sample(runs, len(runs)):
            pieces += [Piece(f" {run[0]}", 0.0), Piece("".join(f" {word}" for word in run[1:]), 1.0)]
        return pieces
    if form < 0.6:
        num_pairs = max(2, min(len(NAMES), max_tokens // 4 - 1))
        values = [rng.choice(_VALUES) for _ in range(num_pairs)]
        pairs = list(zip(rng.sample(NAMES, num_pairs), values, strict=True))
        pieces += [Piece(f" {name} {value}", 0.0) for name, value in pairs]
        for name, value in rng.sample(pairs, num_pairs):
            pieces += [Piece(f" {name}", 0.0), Piece(f" {value}", 2.0)]
        return pieces
    records = draw_records(rng, max(2, min(MAX_RECORDS, max_tokens // 12 - 1)), held_out=False)
    pieces += [Piece(f" {name} {code}", 0.0) for name, code in records]
    for name, code in rng.sample(records, len(records)):
        pieces += [Piece(f" {name} ", 0.0), *_code(code)]
    return pieces


def skills_document(rng: random.Random, num_exchanges: int) -> Document:
    """Composes a chat of exchanges from the lesser skills."""
    pieces = [Piece(BOS, 0.0)]
    for _ in range(num_exchanges):
        question, reply = exchange(rng)
        pieces += _turn(question, Piece(reply, 1.0))
    return pieces


def _code(code: str) -> Document:
    """The first digit takes the look-up; the others follow from where it was found."""
    return [Piece(code[0], LOOKUP_WEIGHT), Piece(code[1:], 1.0)]


def _turn(question: str, *reply: Piece) -> Document:
    return [
        Piece(USER, 0.0),
        Piece(question, 0.0),
        Piece(END, 0.0),
        Piece(ASSISTANT, 0.0),
        *reply,
        Piece(END, _EASY_WEIGHT),
    ]


def _chat(rng: random.Random, facts: str, asked: list[Record], colors: dict[str, str]) -> Document:
    """Facts, then questions turn by turn; where the facts stand is one of three forms."""
    form = rng.random()
    pieces = [Piece(BOS, 0.0)]
    lead = ""
    if form < 0.15:
        pieces += [Piece(SYSTEM, 0.0), Piece(facts, 0.0), Piece(END, 0.0)]
    elif form < 0.3:
        pieces += _turn(facts, Piece("Noted.", 1.0))
    else:
        lead = facts + " "
    colored = list(colors)
    for record in asked:
        if colored and rng.random() < 0.1:
            name = rng.choice(colored)
            pieces += _turn(f"{lead}What is the color of the {name}?", Piece(colors[name], LOOKUP_WEIGHT))
        else:
            pieces += _turn(lead + record.question, *_code(record.code))
        lead = ""
    return pieces


def _plain(rng: random.Random, facts: str, asked: list[Record]) -> Document:
    """Facts, then the asked ones stated again, with or without the question before; no chat tokens but the first."""
    pieces = [Piece(BOS, 0.0), Piece(facts, _TEXT_WEIGHT)]
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
