"""Composes the training documents of the embedded model: chats and plain texts with a loss weight per piece.

Codes cannot be predicted where they are first stated, so those tokens weigh nothing; every question after the facts does.
Many questions follow one set of facts, which makes the share of tokens that teach recall as large as it can be.
"""

import random
from typing import Final

from demo.corpus import ASSISTANT, BOS, END, MAX_RECORDS, SYSTEM, USER, Piece, Record, draw_records, state_facts
from demo.skills import exchange

Document = list[Piece]

_RECORD_TOKENS: Final = 12
_DISTRACTOR_TOKENS: Final = 8
_QUESTION_TOKENS: Final = 16
_FRAME_TOKENS: Final = 12
_TEXT_WEIGHT: Final = 0.02
_EASY_WEIGHT: Final = 0.2


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
    """Composes the bare form of recall: words and their codes, then the same again, in the same order or shuffled.

    The second half is predictable almost everywhere, which lets attention learn to look back early in training.
    """
    pairs = draw_records(rng, max(1, min(MAX_RECORDS, max_tokens // 12 - 1)), held_out=False)
    again = rng.sample(pairs, len(pairs))
    if rng.random() < 0.5:
        text = "".join(f" {name} {code}" for name, code in pairs)
        return [Piece(BOS, 0.0), Piece(text, 0.0), Piece(text, 1.0)]
    pieces = [Piece(BOS, 0.0), *(Piece(f" {name} {code}", 0.0) for name, code in pairs)]
    for name, code in again:
        pieces += [Piece(f" {name}", 0.0), Piece(f" {code}", 1.0)]
    return pieces


def skills_document(rng: random.Random, num_exchanges: int) -> Document:
    """Composes a chat of exchanges from the lesser skills."""
    pieces = [Piece(BOS, 0.0)]
    for _ in range(num_exchanges):
        question, reply = exchange(rng)
        pieces += _turn(question, reply)
    return pieces


def _turn(question: str, reply: str) -> Document:
    return [
        Piece(USER, 0.0),
        Piece(question, 0.0),
        Piece(END, 0.0),
        Piece(ASSISTANT, 0.0),
        Piece(reply, 1.0),
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
        pieces += _turn(facts, "Noted.")
    else:
        lead = facts + " "
    colored = list(colors)
    for record in asked:
        if colored and rng.random() < 0.1:
            name = rng.choice(colored)
            question, reply = f"What is the color of the {name}?", colors[name]
        else:
            question, reply = record.question, record.code
        pieces += _turn(lead + question, reply)
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
            Piece(f" The code of the {record.name} is", _TEXT_WEIGHT),
            Piece(f" {record.code}", 1.0),
            Piece(".", _EASY_WEIGHT),
        ]
    return pieces
