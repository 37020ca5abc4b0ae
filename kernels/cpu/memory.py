"""Memory for packed weights: large mappings in huge pages, of which every layer takes a part.

One row of activations reads every weight once, so a decode step walks through all of them; with pages of 4 KiB the walk
through the page tables costs a tenth to a fifth of the bandwidth. Layers share mappings, so that small ones get huge
pages too and none wastes part of one. Nothing is given back before every layer of a mapping is gone.
"""

import mmap
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

MAPPING_BYTES = 64 << 20
"""Of a mapping, at least. What no layer has taken was never touched and takes no memory."""

_HUGE_PAGE_BYTES = 2 << 20
_LINE_BYTES = 64


class WeightMemory:
    """Hands out uninitialized memory, aligned to cache lines. Any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._free = torch.empty(0, dtype=torch.uint8)  # the rest of the latest mapping; under the lock

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes]. Raises OSError when the system has no memory for another mapping."""
        rounded = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        with self._lock:
            if rounded > len(self._free):
                self._free = _map(max(rounded, MAPPING_BYTES))
            taken, self._free = self._free[:num_bytes], self._free[rounded:]
        return taken


def _map(num_bytes: int) -> Tensor:
    """Anonymous memory in whole huge pages, as a tensor that unmaps it with its last view."""
    rounded = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages: slower, not wrong
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)
