"""How packed linear layers are kept between processes: as named tensors, and as layers again over their memory.

What a tensor must be is checked, what it holds is believed: whoever keeps the tensors answers for that.
"""

import hashlib
from collections.abc import Mapping
from ctypes import CDLL
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.backend import Linear
from kernels.cpu.library import WeightKind
from kernels.cpu.linear import PANEL, CpuLinear, LinearBuffers, Screen, check_inputs, num_scales, padded_to

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

PACKING_VERSION = 2
"""Grows when packing gives its buffers another meaning; what the library does with them is told by its digest."""


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
            coarse, errors = layer.screen
            named |= {"coarse_panels": coarse.panels, "coarse_scales": coarse.scales, "errors": errors}
        return {"shape": shape} | {name: tensor for name, tensor in named.items() if len(tensor)}

    def restore(self, tensors: Mapping[str, Tensor]) -> CpuLinear:
        """A layer over `tensors`, which it keeps. Raises ValueError unless they are what `tensors` returns for one."""
        shape = tensors.get("shape", torch.empty(0))
        if shape.dtype is not torch.int64 or shape.shape != (4,):
            raise ValueError(f"a packed layer has a shape of {shape.dtype} {list(shape.shape)}")
        number, inputs, outputs, out_features = shape.tolist()
        kind = WeightKind(number)
        check_inputs(kind, inputs)
        is_gated = out_features != outputs
        if outputs < 0 or (is_gated and outputs != 2 * padded_to(out_features, PANEL // 2)):
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
        errors, nothing = tensors.get("errors"), torch.empty(0)
        if errors is None:
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
        _check_buffer("errors", errors, torch.float32, (padded_to(buffers.outputs),))
        return Screen(coarse, errors)


def _check(buffers: LinearBuffers, library: CDLL) -> None:
    """Raises ValueError unless every buffer has the type and size that the kernels read."""
    padded = padded_to(buffers.outputs)
    num_sums = padded if buffers.kind is WeightKind.INT8 else 0
    packed_bytes = library.staffetta_packed_bytes(buffers.kind, buffers.outputs, buffers.inputs)
    expected = (
        ("panels", buffers.panels, torch.uint8, (packed_bytes,)),
        ("scales", buffers.scales, torch.float32, (num_scales(buffers.kind, buffers.inputs, padded),)),
        ("sums", buffers.sums, torch.int32, (num_sums,)),
        ("bias", buffers.bias, torch.float32, (0, padded)),
    )
    for name, tensor, dtype, sizes in expected:
        _check_buffer(name, tensor, dtype, sizes)


def _check_buffer(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    is_plain = tensor.dim() == 1 and tensor.is_contiguous() and tensor.dtype is dtype
    if not is_plain or len(tensor) not in sizes:
        raise ValueError(f"a packed layer's {name} are {tensor.dtype} {list(tensor.shape)}, not {dtype} {sizes}")
