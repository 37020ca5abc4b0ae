"""Drawing and scoring tokens in compiled code: draws become the records that `src/abi.h` declares, failures exceptions.

What comes out is specified in `kernels.sampling`, and is equal to it but for the roundings of exp and log.
"""

import struct
from array import array
from collections.abc import Sequence
from ctypes import byref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.cpu import library as abi
from kernels.cpu.library import Matrix, check, matrix, rows
from kernels.sampling import Penalties, TokenDraw, TokenScores

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

_FAILURES = {-1: "the model's logits are not finite", -2: "every token is banned"}
"""What stands in the place of a token that could not be drawn."""
_UNPENALISED = Penalties(1.0, 0.0, 0.0, (), ())
_DRAW = struct.Struct("=qqQqqqqdffffII")
"""`Draw` of `src/abi.h`: row, top_k, seed, first_id, num_prompt, num_output, num_banned, top_p, temperature,
repetition, presence, frequency, choice, output_index."""


class Sampler:
    """Draws tokens with a backend's compiled code. Any thread, one call at a time each."""

    def __init__(self, backend: "CpuBackend") -> None:
        self._backend = backend
        self._described: tuple[Tensor | None, Matrix] = None, abi.NO_MATRIX
        """The logits that were seen last, and where they are: a step writes its own into the same tensor again and
        again."""

    def sample(self, logits: Tensor, draws: Sequence[TokenDraw]) -> list[int]:
        """See `kernels.sampling.sample`. Raises IndexError for a draw from a row that is not there.

        Neither torch nor numpy is used where the logits are those of the last call: after a step that has filled the
        caches with weights, the first use of each of their functions costs some 50 us.
        """
        backend = self._backend
        described, owner = self._describe(logits)
        packed, token_ids = pack_draws(draws)
        tokens = array("q", bytes(8 * len(draws)))
        address, _ = tokens.buffer_info()
        status = backend.library.staffetta_sample(
            backend.isa, backend.threads, byref(described), packed, len(draws), token_ids, address
        )
        if status:
            check(status, out_of_range=f"a draw is from a row outside the {len(owner)} there are")
        drawn = tokens.tolist()
        for token in drawn:
            if token < 0:
                raise ArithmeticError(_FAILURES[token])
        return drawn

    def _describe(self, logits: Tensor) -> tuple[Matrix, Tensor]:
        """Where logits are as float32 rows, and the tensor that owns those."""
        known, described = self._described
        if logits is known:
            return described, logits
        owner = rows(logits.float())
        described = matrix(owner)
        if owner is logits:
            self._described = logits, described
        return described, owner


def score_tokens(backend: "CpuBackend", logits: Tensor, *, at: Tensor, targets: Tensor, count: int) -> TokenScores:
    """See `kernels.sampling.score_tokens`; `at` are its rows."""
    logits, at, targets = rows(logits.float()), at.contiguous(), targets.contiguous()
    num_top = min(count, logits.shape[1])
    scores = TokenScores(
        torch.empty(len(at), dtype=torch.float32),
        torch.empty(len(at), num_top, dtype=torch.int64),
        torch.empty(len(at), num_top, dtype=torch.float32),
    )
    call = abi.ScoreArguments(
        logits=matrix(logits),
        num_rows=len(at),
        num_top=num_top,
        rows=at.data_ptr(),
        targets=targets.data_ptr(),
        logprobs=scores.logprobs.data_ptr(),
        top_ids=scores.top_ids.data_ptr(),
        top_logprobs=scores.top_logprobs.data_ptr(),
    )
    status = backend.library.staffetta_score_tokens(backend.isa, backend.threads, byref(call))
    check(status, out_of_range=f"a row or a target is outside the logits, {list(logits.shape)}")
    if not scores.logprobs.isfinite().all():
        raise ArithmeticError("the model's logits are not finite")
    return scores


def pack_draws(draws: Sequence[TokenDraw]) -> tuple[bytes, bytes]:
    """The draws as the kernels read them, and all their token ids one after another."""
    records: list[bytes] = []
    ids: list[bytes] = []
    num_ids = 0
    for draw in draws:
        repetition, presence, frequency, prompt, output = draw.penalties or _UNPENALISED
        records.append(
            _DRAW.pack(
                draw.row,
                draw.top_k,
                draw.seed & 0xFFFFFFFFFFFFFFFF,
                num_ids,
                len(prompt),
                len(output),
                len(draw.banned),
                draw.top_p,
                draw.temperature,
                repetition,
                presence,
                frequency,
                draw.choice & 0xFFFFFFFF,
                draw.output_index & 0xFFFFFFFF,
            )
        )
        for part in (prompt, output, draw.banned):
            if part:
                ids.append(struct.pack(f"{len(part)}q", *part))  # several times as fast as an array's conversion
                num_ids += len(part)
    return b"".join(records), b"".join(ids)
