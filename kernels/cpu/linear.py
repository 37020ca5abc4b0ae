"""Linear layers of the compiled kernels: weights packed in panels, and for heads what tells the largest output sooner.

Packing happens once, when a model is loaded; what it makes does not depend on the number of threads. A layer reads its
buffers and never writes them: they may be read-only memory that several processes share.
"""

from ctypes import addressof, byref, c_int32
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import library as abi
from kernels.cpu.library import WeightKind, check, matrix, rows
from kernels.cpu.screening import MOST_ERROR, coarse_copy
from kernels.reference import GROUP_INPUTS, quantize_groups, quantize_rows

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

PANEL = 32
"""Outputs of a panel."""

_MAX_INT8_INPUTS = (2**31 - 1) // (127 * 128)
"""Products of two int8 are summed in int32, exactly as long as there are no more of them than this."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearBuffers:
    """A layer's packed weights. `outputs` counts packed rows, `out_features` what the layer returns: half, when gated.

    panels: uint8, as `src/pack.h` lays them. scales: float32, [padded outputs], for INT4 [panels x groups x PANEL],
    empty for floats. sums: [padded outputs], int32, empty but for INT8. bias: [padded outputs], float32, or empty.
    Outputs are padded to whole panels.
    """

    kind: WeightKind
    inputs: int
    outputs: int
    out_features: int
    panels: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor

    def described(self) -> abi.PackedWeight:
        """Where they are, for the library."""
        return abi.PackedWeight(
            panels=self.panels.data_ptr(),
            bias=self.bias.data_ptr() or None,
            scales=self.scales.data_ptr(),
            sums=self.sums.data_ptr(),
            inputs=self.inputs,
            outputs=self.outputs,
            kind=self.kind,
            gated=int(self.out_features != self.outputs),
        )


class Screen(NamedTuple):
    """What tells which outputs of a layer may be the largest of a row: its weights as INT8_ONLY, and the copy's errors.

    errors: [padded outputs], float32, as `kernels.cpu.screening` says.
    """

    coarse: LinearBuffers
    errors: Tensor


class CpuLinear:
    """A linear layer in panels of 32 outputs, with its epilogue. Immutable, but for how often its screen is asked."""

    def __init__(self, backend: "CpuBackend", buffers: LinearBuffers, screen: Screen | None = None) -> None:
        self._backend = backend
        self.buffers = buffers
        self.screen = screen
        self.out_features = buffers.out_features
        self.packed = buffers.described()
        self.screened = abi.Screen()
        self._num_unasked = c_int32(0)  # changed by whoever computes
        if screen is not None:
            unasked = addressof(self._num_unasked)
            self.screened = abi.Screen(screen.coarse.described(), screen.errors.data_ptr(), unasked)

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Computes rows; contract of `kernels.backend.Linear`. Raises ValueError for rows of another width."""
        if x.dim() != 2 or x.shape[1] != self.packed.inputs:
            raise ValueError(f"x has shape {list(x.shape)}, the layer takes [rows, {self.packed.inputs}]")
        x = rows(x)
        out = x.new_empty(len(x), self.out_features, dtype=dtype)
        if residual is not None and residual.shape != out.shape:
            raise ValueError(f"residual has shape {list(residual.shape)}, the result {list(out.shape)}")
        other = None if residual is None else rows(residual.to(out.dtype))
        status = self._backend.library.staffetta_linear(
            self._backend.isa,
            self._backend.threads,
            byref(self.packed),
            byref(matrix(x)),
            byref(abi.NO_MATRIX if other is None else matrix(other)),
            byref(matrix(out)),
        )
        check(status, out_of_range="")
        return out


def pack(
    backend: "CpuBackend",
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: WeightKind,
    scales: Tensor | None,
    gated_outputs: int | None,
) -> CpuLinear:
    """Packs weight [N, K] and bias [N] into memory of the backend's; keeps no tensor that it is given.

    `scales` are those of a weight that is int8 already, else None. `gated_outputs` None: as many outputs as weight has
    rows; else rows alternate as `interleave` lays them. Raises ValueError for a weight without inputs or with too many.
    """
    return CpuLinear(backend, _pack(backend, weight, bias, kind=kind, scales=scales, gated_outputs=gated_outputs))


def pack_with_screen(backend: "CpuBackend", weight: Tensor, *, kind: WeightKind) -> CpuLinear:
    """Packs weight [N, K], which are floats, and a screen for it, unless its numbers are too large to be bounded."""
    buffers = _pack(backend, weight, None, kind=kind, scales=None, gated_outputs=None)
    integers, scales, errors = coarse_copy(weight)
    if not (errors < MOST_ERROR).all():  # NaN is not
        return CpuLinear(backend, buffers)
    coarse = _pack(backend, integers, None, kind=WeightKind.INT8_ONLY, scales=scales, gated_outputs=None)
    return CpuLinear(backend, buffers, Screen(coarse, _in_panels(errors, padded_to(len(errors)))))


def _pack(
    backend: "CpuBackend",
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: WeightKind,
    scales: Tensor | None,
    gated_outputs: int | None,
) -> LinearBuffers:
    outputs, inputs = weight.shape
    check_inputs(kind, inputs)
    padded = padded_to(outputs)
    if kind in _QUANTIZE and scales is None:
        weight, scales = _QUANTIZE[kind](weight)
    buffers = LinearBuffers(
        kind=kind,
        inputs=inputs,
        outputs=outputs,
        out_features=outputs if gated_outputs is None else gated_outputs,
        panels=backend.weight_memory.take(backend.library.staffetta_packed_bytes(kind, outputs, inputs)),
        scales=torch.empty(num_scales(kind, inputs, padded)) if scales is None else _in_panels(scales, padded),
        sums=torch.empty(padded if kind is WeightKind.INT8 else 0, dtype=torch.int32),
        bias=torch.empty(0) if bias is None else functional.pad(bias.float(), (0, padded - outputs)),
    )
    source = rows(weight)
    status = backend.library.staffetta_pack(
        kind,
        byref(matrix(source)),
        buffers.panels.data_ptr(),
        buffers.scales.data_ptr(),
        buffers.sums.data_ptr(),
        backend.threads,
    )
    check(status, out_of_range="")
    return buffers


_QUANTIZE = {WeightKind.INT8_ONLY: quantize_rows, WeightKind.INT4: quantize_groups}
"""What makes integers and scales of weights before they are packed."""


def _in_panels(scales: Tensor, padded: int) -> Tensor:
    """Scales [outputs] or [outputs, groups] as the kernels read them: [padded] or [panels x groups x PANEL]."""
    columns = scales.float().view(len(scales), -1)
    whole = functional.pad(columns, (0, 0, 0, padded - len(scales)))
    return whole.view(-1, PANEL, whole.shape[1]).transpose(1, 2).flatten()


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """16 rows of gate, 16 of up, and so on: both halves of a product in one panel. Padded with zeros."""
    half = PANEL // 2
    missing = -len(gate) % half
    padded = [functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor for tensor in (gate, up)]
    return torch.stack([tensor.view(-1, half, tensor.shape[1]) for tensor in padded], dim=1).flatten(0, 2)


def check_inputs(kind: WeightKind, inputs: int) -> None:
    """Raises ValueError for a weight without inputs, or with too many to be summed."""
    if inputs < 1:
        raise ValueError("a linear layer needs at least one input")
    if kind is WeightKind.INT8 and inputs > _MAX_INT8_INPUTS:
        raise ValueError(f"{inputs} inputs overflow the sums of an INT8 layer; up to {_MAX_INT8_INPUTS} fit")


def num_scales(kind: WeightKind, inputs: int, padded: int) -> int:
    """Scales of a weight of so many outputs, padded to whole panels."""
    match kind:
        case WeightKind.INT8 | WeightKind.INT8_ONLY:
            return padded
        case WeightKind.INT4:
            return padded * -(-inputs // GROUP_INPUTS)
        case _:
            return 0


def padded_to(count: int, unit: int = PANEL) -> int:
    """The least multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit
