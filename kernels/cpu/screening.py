"""A layer's weights in int8, and how far its outputs may be from the copy's: what `src/largest.h` rules outputs out by.

With w an output's weights, c the copy's, K inputs, u = 2^-24 and |x| between 2^-40 and 2^50:

- A sum in float32 in any order, products fused or rounded, is off by at most K u / (1 - K u) times |w| |x|, and the
  copy's by |c| |x|; without roundings the two differ by at most |w - c| |x|. Twice the share of the sums covers the
  roundings of the bounds themselves, and of |x|. Higham 2002, "Accuracy and Stability of Numerical Algorithms",
  section 3.1, with Cauchy and Schwarz.
- Some dot products take weights, products and sums below 2^-126 as 0, and norms take squares as 0: less than
  sqrt(K) 2^-62 |x| is lost by all of that.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import quantize_rows

MOST_ERROR = 2.0**50
"""Beyond it sums might overflow, and nothing is ruled out."""

_CHUNK_ROWS = 1024


class CoarseCopy(NamedTuple):
    """integers: [N, K], int8. scales, errors: [N], float32; an error is the most by which outputs differ, over |x|."""

    integers: Tensor
    scales: Tensor
    errors: Tensor


def coarse_copy(weight: Tensor) -> CoarseCopy:
    """Copies weight [N, K], which are floats. Errors are NaN for weights that are not finite."""
    copy = CoarseCopy(torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight)), torch.empty(len(weight)))
    for first in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(first, first + _CHUNK_ROWS)
        _copy(weight[rows].float(), CoarseCopy(*(part[rows] for part in copy)))
    return copy


def _copy(weight: Tensor, copy: CoarseCopy) -> None:
    """Fills `copy` with that of weight [rows, K], float32."""
    integers, scales = quantize_rows(weight)
    lost, inputs = weight - integers.float() * scales[:, None], weight.shape[1]
    of_copy, of_weight = (torch.linalg.vector_norm(rows, dim=1) for rows in (lost, weight))
    of_sums = 4 * (inputs + 16) * 2.0**-24 * (of_weight + of_copy)
    errors = of_copy + of_sums + inputs**0.5 * 2.0**-62
    for part, made in zip(copy, (integers, scales, torch.nextafter(errors, torch.tensor(torch.inf))), strict=True):
        part.copy_(made)
