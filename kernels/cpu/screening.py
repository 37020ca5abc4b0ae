"""A layer's weights in int8, and how far its outputs may be from the copy's: what `src/largest.h` rules outputs out by.

With w an output's weights, c the copy's, K inputs and u = 2^-24: a sum in float32 in any order, products fused or
rounded, is off by at most K u / (1 - K u) times |w| |x|, so is the copy's by |c| |x|, and the exact outputs differ by
at most |w - c| |x|. Twice the share of the sums covers the roundings of the bounds themselves, which are float32 too.
Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1, with Cauchy and Schwarz.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import quantize_rows

MOST_ERROR = 2.0**50
"""Beyond it sums might overflow, and nothing is ruled out."""

_CHUNK_ROWS = 1024


class CoarseCopy(NamedTuple):
    """integers: [N, K], int8. scales: [N], float32. errors: [N], float32, the most that outputs differ for |x| = 1."""

    integers: Tensor
    scales: Tensor
    errors: Tensor


def coarse_copy(weight: Tensor) -> CoarseCopy:
    """Copies weight [N, K], which are floats. Errors are NaN for weights that are not finite."""
    copies = [_copy(chunk) for chunk in torch.split(weight, _CHUNK_ROWS)]
    return CoarseCopy(*(torch.cat(parts) for parts in zip(*copies, strict=True)))


def _copy(weight: Tensor) -> CoarseCopy:
    weight, inputs = weight.float(), weight.shape[1]
    integers, scales = quantize_rows(weight)
    lost = torch.linalg.vector_norm(torch.addcmul(weight, integers.float(), scales[:, None], value=-1), dim=1)
    of_sums = 4 * (inputs + 16) * 2.0**-24 * (torch.linalg.vector_norm(weight, dim=1) + lost)
    of_squares = inputs**0.5 * 2.0**-62  # of numbers so small that theirs are 0
    return CoarseCopy(integers, scales, torch.nextafter(lost + of_sums + of_squares, torch.tensor(torch.inf)))
