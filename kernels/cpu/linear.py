"""Linear layers of the compiled kernels: weights packed in panels, and how packed weights are kept between processes.

Packing happens once, when a model is loaded; what it makes does not depend on the number of threads. A layer reads its
buffers and never writes them: they may be read-only memory that several processes share.
"""

import hashlib
from collections.abc import Mapping
from ctypes import CDLL, byref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import Linear
from kernels.cpu import library as abi
from kernels.cpu.library import WeightKind, check, matrix, rows
from kernels.cpu.screening import MOST_ERROR, coarse_copy
from kernels.reference import GROUP_INPUTS, quantize_groups, quantize_rows

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

PANEL = 32
"""Outputs of a panel."""

PACKING_VERSION = 2
"""Grows when this module gives its buffers another meaning; what the library does with them is told by its digest."""

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
    """A linear layer in panels of 32 outputs, with its epilogue. Immutable."""

    def __init__(self, backend: "CpuBackend", buffers: LinearBuffers, screen: Screen | None = None) -> None:
        self._backend = backend
        self.buffers = buffers
        self.screen = screen
        self.out_features = buffers.out_features
        self.packed = buffers.described()
        self.screened = abi.Screen()
        if screen is not None:
            self.screened = abi.Screen(screen.coarse.described(), screen.errors.data_ptr())

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
    return CpuLinear(backend, buffers, Screen(coarse, _in_panels(errors, _padded(len(errors)))))


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
    _check_inputs(kind, inputs)
    padded = _padded(outputs)
    if kind in _QUANTIZE and scales is None:
        weight, scales = _QUANTIZE[kind](weight)
    buffers = LinearBuffers(
        kind=kind,
        inputs=inputs,
        outputs=outputs,
        out_features=outputs if gated_outputs is None else gated_outputs,
        panels=backend.weight_memory.take(backend.library.staffetta_packed_bytes(kind, outputs, inputs)),
        scales=torch.empty(_num_scales(kind, inputs, padded)) if scales is None else _in_panels(scales, padded),
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


class CpuPacking:
    """Layers as named tensors and back: the `kernels.backend.Packing` of the compiled kernels."""

    def __init__(self, backend: "CpuBackend", library: bytes) -> None:
        """`library` is the shared library's content."""
        self._backend = backend
        self._digest = hashlib.blake2b(library, digest_size=16).hexdigest()

    @property
    def version(self) -> str:
        """Another one for every build of the library: no hand needs to remember that a layout has changed."""
        return f"panels {PACKING_VERSION} {self._digest}"

    def tensors(self, layer: Linear) -> dict[str, Tensor]:
        """The layer's buffers that are not empty, and its numbers as `shape`, [4], int64. Shares their memory."""
        if not isinstance(layer, CpuLinear):
            raise TypeError(f"{layer!r} is no linear layer of the compiled kernels")
        own = layer.buffers
        shape = torch.tensor([own.kind, own.inputs, own.outputs, own.out_features])
        named = {"panels": own.panels, "scales": own.scales, "sums": own.sums, "bias": own.bias}
        if layer.screen is not None:
            coarse, bounds = layer.screen
            named |= {"coarse_panels": coarse.panels, "coarse_scales": coarse.scales, "errors": bounds}
        return {"shape": shape} | {name: tensor for name, tensor in named.items() if len(tensor)}

    def restore(self, tensors: Mapping[str, Tensor]) -> CpuLinear:
        """A layer over `tensors`, which it keeps. Raises ValueError unless they are what `tensors` returns for one."""
        shape = tensors.get("shape", torch.empty(0))
        if shape.dtype is not torch.int64 or shape.shape != (4,):
            raise ValueError(f"a packed layer has a shape of {shape.dtype} {list(shape.shape)}")
        number, inputs, outputs, out_features = shape.tolist()
        kind = WeightKind(number)
        _check_inputs(kind, inputs)
        is_gated = out_features != outputs
        if outputs < 0 or (is_gated and outputs != 2 * _padded(out_features, PANEL // 2)):
            raise ValueError(f"a packed layer has {outputs} rows for {out_features} outputs")
        buffers = LinearBuffers(
            kind=kind,
            inputs=inputs,
            outputs=outputs,
            out_features=out_features,
            panels=tensors.get("panels", torch.empty(0, dtype=torch.uint8)),
            scales=tensors.get("scales", torch.empty(0)),
            sums=tensors.get("sums", torch.empty(0, dtype=torch.int32)),
            bias=tensors.get("bias", torch.empty(0)),
        )
        _check(buffers, self._backend.library)
        return CpuLinear(self._backend, buffers, self._restore_screen(buffers, tensors))

    def _restore_screen(self, buffers: LinearBuffers, tensors: Mapping[str, Tensor]) -> Screen | None:
        """The screen of the layer of `buffers`, if `tensors` have one."""
        bounds, nothing = tensors.get("errors"), torch.empty(0)
        if bounds is None:
            return None
        coarse = LinearBuffers(
            kind=WeightKind.INT8_ONLY,
            inputs=buffers.inputs,
            outputs=buffers.outputs,
            out_features=buffers.outputs,
            panels=tensors.get("coarse_panels", nothing),
            scales=tensors.get("coarse_scales", nothing),
            sums=nothing.int(),
            bias=nothing,
        )
        _check(coarse, self._backend.library)
        _check_buffer("errors", bounds, torch.float32, (_padded(buffers.outputs),))
        return Screen(coarse, bounds)


def _check_inputs(kind: WeightKind, inputs: int) -> None:
    if inputs < 1:
        raise ValueError("a linear layer needs at least one input")
    if kind is WeightKind.INT8 and inputs > _MAX_INT8_INPUTS:
        raise ValueError(f"{inputs} inputs overflow the sums of an INT8 layer; up to {_MAX_INT8_INPUTS} fit")


def _check(buffers: LinearBuffers, library: CDLL) -> None:
    """Raises ValueError unless every buffer has the type and size that the kernels read."""
    padded = _padded(buffers.outputs)
    num_scales = _num_scales(buffers.kind, buffers.inputs, padded)
    num_sums = padded if buffers.kind is WeightKind.INT8 else 0
    packed_bytes = library.staffetta_packed_bytes(buffers.kind, buffers.outputs, buffers.inputs)
    expected = (
        ("panels", buffers.panels, torch.uint8, (packed_bytes,)),
        ("scales", buffers.scales, torch.float32, (num_scales,)),
        ("sums", buffers.sums, torch.int32, (num_sums,)),
        ("bias", buffers.bias, torch.float32, (0, padded)),
    )
    for name, tensor, dtype, sizes in expected:
        _check_buffer(name, tensor, dtype, sizes)


def _check_buffer(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    is_plain = tensor.dim() == 1 and tensor.is_contiguous() and tensor.dtype is dtype
    if not is_plain or len(tensor) not in sizes:
        raise ValueError(f"a packed layer's {name} are {tensor.dtype} {list(tensor.shape)}, not {dtype} {sizes}")


def _num_scales(kind: WeightKind, inputs: int, padded: int) -> int:
    match kind:
        case WeightKind.INT8 | WeightKind.INT8_ONLY:
            return padded
        case WeightKind.INT4:
            return padded * -(-inputs // GROUP_INPUTS)
        case _:
            return 0


def _padded(count: int, unit: int = PANEL) -> int:
    return -(-count // unit) * unit
