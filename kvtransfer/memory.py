"""The memory behind a worker's KV pool: one writer, the process that made it; everybody else may at most read.

On Linux the pool lives in a memfd that is sealed once its owner has mapped it: from then on nobody can map it writable,
write to its descriptor, or change its size (a shrinking file would end its readers with SIGBUS). Elsewhere it is
anonymous memory, which `is_shareable` says.

    0                     num_blocks * page_bytes         size_bytes
    | page 0 | page 1 | … | probe: PROBE_BYTES            |

The probe holds a fixed pattern in every process. Peers read it to measure a transport; no block is ever touched for
that.
"""

import errno
import fcntl
import mmap
import os
from typing import Final

import numpy as np

from kvtransfer.layout import BlockId

PROBE_UNIT_BYTES: Final = 64 * 1024
NUM_PROBE_UNITS: Final = 64
PROBE_BYTES: Final = NUM_PROBE_UNITS * PROBE_UNIT_BYTES

# Not in Python's `fcntl`: existing writable mappings go on, new ones and write() are refused. Linux 5.1.
F_SEAL_FUTURE_WRITE: Final = 0x0010


class PoolMemory:
    """Owns `num_blocks` pages of `page_bytes` bytes each, zero at first, and the probe behind them.

    Any thread may take views. Who may write to which block at what time is the business of leases, not of this class.
    """

    def __init__(self, num_blocks: int, page_bytes: int) -> None:
        if num_blocks < 1 or page_bytes < 1:
            raise ValueError(f"a pool of {num_blocks} pages of {page_bytes} bytes has no room; both must be at least 1")
        self.num_blocks = num_blocks
        self.page_bytes = page_bytes
        self._descriptor, mapping = _allocate(self.size_bytes)
        whole = memoryview(mapping)
        self.buffer: memoryview = whole[: num_blocks * page_bytes]
        self.probe: memoryview = whole[num_blocks * page_bytes :].toreadonly()
        whole[num_blocks * page_bytes :] = _probe_pattern()

    @property
    def size_bytes(self) -> int:
        """Bytes of pages and probe together."""
        return self.num_blocks * self.page_bytes + PROBE_BYTES

    @property
    def is_shareable(self) -> bool:
        """Whether `read_only_fd` works; false where the system has no sealed memfd, and after `close`."""
        return self._descriptor is not None

    def read_only_fd(self) -> int:
        """Opens a descriptor through which the memory can be mapped for reading only. The caller closes it."""
        if self._descriptor is None:
            raise ValueError("this pool's memory cannot be shared: it is closed, or the system has no sealed memfd")
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def block(self, block_id: BlockId) -> memoryview:
        """One page, writable. Raises IndexError for an id outside the pool, negative ones included."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is not in a pool of {self.num_blocks} blocks")
        return self.buffer[block_id * self.page_bytes : (block_id + 1) * self.page_bytes]

    def close(self) -> None:
        """Ends sharing and gives the views up; idempotent. The mapping itself goes when the last view of it does.

        So a transport thread or a tensor that still holds a view never meets unmapped memory.
        """
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.buffer = self.probe = memoryview(b"")


def has_shrink_seal(descriptor: int) -> bool:
    """Whether the file behind `descriptor` can never get shorter, so that reading a mapping of it is safe."""
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError as error:
        if error.errno == errno.EINVAL:  # not a memfd: it has no seals
            return False
        raise


def _allocate(size_bytes: int) -> tuple[int | None, mmap.mmap]:
    """Returns (descriptor, mapping) of zeroed memory, sealed; descriptor None where it cannot be sealed."""
    if not hasattr(os, "memfd_create"):
        return None, mmap.mmap(-1, size_bytes)
    descriptor = os.memfd_create("staffetta-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        mapping = mmap.mmap(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno == errno.EINVAL:  # a kernel that lacks one of the seals
            return None, mmap.mmap(-1, size_bytes)
        raise
    return descriptor, mapping


def _probe_pattern() -> bytes:
    """PROBE_BYTES bytes, no two words of 8 alike, so that a shifted or repeated part is seen."""
    words = np.arange(1, PROBE_BYTES // 8 + 1, dtype="<u8")
    return (words * np.uint64(0x9E3779B97F4A7C15)).tobytes()
