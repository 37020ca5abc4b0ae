"""Writes a safetensors file tensor by tensor, so that a checkpoint may be larger than memory.

The format: eight bytes with the header's length, little-endian; a JSON header with each tensor's dtype, shape and byte
range; the bytes. The header comes first, so every size is declared before any byte is made.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

_METADATA: Final = "__metadata__"
_ALIGNMENT: Final = 64
_STORED: Final[dict[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor that will be written: `pieces` makes its elements in order, any number of rows at a time."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[PlannedTensor]) -> None:
    """Writes `tensors` in their order; the file appears under its name only when it is whole.

    Each tensor's pieces are made once, after those of all tensors before it. Raises ValueError for pieces that are not
    what was planned.
    """
    header = _header(tensors)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                if piece.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name} is planned as {tensor.dtype}, a piece is {piece.dtype}")
                written += file.write(piece.contiguous().view(torch.uint8).numpy().data)
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name} is planned with {tensor.num_bytes} bytes, its pieces have {written}")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def tensor_sizes(path: Path) -> dict[str, int]:
    """The bytes of every tensor in a file, by the file's header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != _METADATA}
    return {name: end - begin for name, (begin, end) in offsets.items()}


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    """The JSON header, padded with blanks so that the data behind it is aligned."""
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % _ALIGNMENT)
