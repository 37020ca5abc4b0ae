"""Drawing and scoring tokens in compiled code: draws become the array that `src/abi.h` declares, failures exceptions.

What comes out is specified in `kernels.sampling`, and is equal to it but for the roundings of exp and log.
"""

import struct
from collections.abc import Sequence
from ctypes import byref
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu import library as abi
from kernels.cpu.library import check, matrix, rows
from kernels.sampling import Penalties, TokenDraw, TokenScores

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

_NOT_FINITE, _ALL_BANNED = -1, -2
_UNPENALISED = Penalties(1.0, 0.0, 0.0, (), ())
_DRAW = np.dtype(
    [
        *((name, np.int64) for name in ("row", "top_k")),
        ("seed", np.uint64),
        *((name, np.int64) for name in ("first_id", "num_prompt", "num_output", "num_banned")),
        ("top_p", np.float64),
        *((name, np.float32) for name in ("temperature", "repetition", "presence", "frequency")),
        *((name, np.uint32) for name in ("choice", "output_index")),
    ]
)


def sample(backend: "CpuBackend", logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """See `kernels.sampling.sample`. Raises IndexError for a draw from a row that is not there."""
    logits = rows(logits.float())
    packed, token_ids = _pack(draws)
    tokens = torch.empty(len(draws), dtype=torch.int64)
    status = backend.library.staffetta_sample(
        backend.isa,
        backend.threads,
        byref(matrix(logits)),
        packed.ctypes.data,
        len(draws),
        token_ids.ctypes.data,
        tokens.data_ptr(),
    )
    check(status, out_of_range=f"a draw is from a row outside the {len(logits)} there are")
    if (tokens < 0).any():
        if (tokens == _NOT_FINITE).any():
            raise ArithmeticError("the model's logits are not finite")
        raise ArithmeticError("every token is banned")
    return tokens


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


def _pack(draws: Sequence[TokenDraw]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The draws as the kernels read them, and all their token ids one after another."""
    ids: list[bytes] = []
    num_ids = 0
    records = []
    for draw in draws:
        repetition, presence, frequency, prompt, output = draw.penalties or _UNPENALISED
        records.append(
            (
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
                ids.append(struct.pack(f"{len(part)}q", *part))  # several times as fast as numpy's conversion
                num_ids += len(part)
    return np.array(records, dtype=_DRAW), np.frombuffer(b"".join(ids), np.int64)
