"""Turns documents into rectangular batches: which lengths a step trains on, and the tensors of one step.

Everything here is a function of (seed, step, level), never of what was drawn before: a resumed run sees the same data.
"""

import random
from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo.corpus import PAD
from demo.documents import Document, drill_document, recall_document, skills_document
from demo.tokenizer import special_ids

LENGTHS: Final = (96, 128, 256, 512, 1024, 1600)
"""The curriculum: level n trains on the first n + 1 of these."""

_DRILL_SHARES: Final = (0.4, 0.4, 0.25, 0.1, 0.05, 0.05)
_MIN_ROWS: Final = 4
_TOP_SHARE: Final = 0.4
_SKILL_LENGTH: Final = 256
_SKILL_EXCHANGES: Final = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens and what each next token weighs.

    tokens, targets: [rows, length], int64, padded at the end; weights: [rows, length], fp32, 0 on pads. level: index of
    the length in ``LENGTHS``.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    level: int


class Batcher:
    """Composes the batches of a step. Holds the tokenizer and the seed; drawing changes nothing in it."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int, batch_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch_tokens = batch_tokens
        self._special_ids = special_ids(tokenizer)

    def recall(self, step: int, level: int) -> Batch:
        """The recall batch of a step: of the level's own length or of a shorter one, so that none is forgotten."""
        rng = random.Random(f"recall:{self.seed}:{step}")
        drawn = level if rng.random() < _TOP_SHARE else rng.randint(0, level)
        length = LENGTHS[drawn]
        rows = max(_MIN_ROWS, self.batch_tokens // length)
        drill_share = _DRILL_SHARES[level]
        documents = [
            drill_document(rng, length) if rng.random() < drill_share else recall_document(rng, length)
            for _ in range(rows)
        ]
        return self._pack(documents, length, drawn)

    def skills(self, step: int, rows: int) -> Batch:
        """The batch of lesser skills of a step."""
        rng = random.Random(f"skills:{self.seed}:{step}")
        documents = [skills_document(rng, _SKILL_EXCHANGES) for _ in range(rows)]
        return self._pack(documents, _SKILL_LENGTH, 0)

    def encode(self, document: Document) -> tuple[list[int], list[float]]:
        """Returns the ids and weights of a document, piece by piece."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in document:
            special = self._special_ids.get(text)
            piece = [special] if special is not None else self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def _pack(self, documents: list[Document], length: int, level: int) -> Batch:
        encoded = [self.encode(document) for document in documents]
        longest = min(length, max(len(ids) for ids, _ in encoded) - 1) + 1
        ids = torch.full((len(encoded), longest), self._special_ids[PAD], dtype=torch.int64)
        weights = torch.zeros((len(encoded), longest))
        for row, (row_ids, row_weights) in enumerate(encoded):
            size = min(len(row_ids), longest)
            ids[row, :size] = torch.tensor(row_ids[:size])
            weights[row, :size] = torch.tensor(row_weights[:size])
        return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], level)
