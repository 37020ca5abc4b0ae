"""The memory behind a worker's KV pool: one writer, the process that made it; everybody else may at most read.

On Linux the pool lives in a memfd that is sealed once its owner has mapped it: from then on nobody can map it writable,
write to its descriptor, or change its size (a shrinking file would end its readers with SIGBUS). Elsewhere it is
anonymous memory, which `is_shareable` says.

    0                     num_blocks * page_bytes         size_bytes
    | page 0 | page 1 | … | probe: PROBE_BYTES            |

The probe holds a fixed pattern in every process. Peers read it to measure a transport; no block is ever touched for
that.

It is mapped where it can have huge pages, by its owner and by its readers: a decode step goes through blocks that lie
scattered, and with pages of 4 KiB finding them took a quarter of a step of 16 streams of 2,048 tokens.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Final

import numpy as np

from kvtransfer.layout import BlockId

HUGE_PAGE_BYTES: Final = 2 * 2**20
"""Of a huge page where pages have 4 KiB. Elsewhere nothing depends on it."""

PROBE_UNIT_BYTES: Final = 64 * 1024
NUM_PROBE_UNITS: Final = 64
PROBE_BYTES: Final = NUM_PROBE_UNITS * PROBE_UNIT_BYTES

# Not in Python's `fcntl`: existing writable mappings go on, new ones and write() are refused. Linux 5.1.
F_SEAL_FUTURE_WRITE: Final = 0x0010

# Not in Python's `mmap`.
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10


class PoolMemory:
    """Owns `num_blocks` pages of `page_bytes` bytes each, zero at first, and the probe behind them.

    Any thread may take views. Who may write to which block at what time is the business of leases, not of this class.
    """

    def __init__(self, num_blocks: int, page_bytes: int) -> None:
        if num_blocks < 1 or page_bytes < 1:
            raise ValueError(f"a pool of {num_blocks} pages of {page_bytes} bytes has no room; both must be at least 1")
        self.num_blocks = num_blocks
        self.page_bytes = page_bytes
        self._descriptor, whole = _allocate(self.size_bytes)
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


def map_file(descriptor: int, size_bytes: int, *, protection: int) -> memoryview:
    """Maps a file's first `size_bytes` as Linux shares it, where its huge pages can be mapped as such if there is room.

    The view is read-only unless `protection` has PROT_WRITE. What is mapped goes with its last view. Raises OSError.
    """
    try:
        # No access: it is neither data nor committed, however little of these the process may have.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=flags, prot=_PROT_NONE)
    except OSError:  # too few addresses for that much more: anywhere will do
        view = memoryview(mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, protection))
    else:
        view = _map_within(reserved, descriptor, size_bytes, protection)
    return view if protection & mmap.PROT_WRITE else view.toreadonly()


def _map_within(reserved: mmap.mmap, descriptor: int, size_bytes: int, protection: int) -> memoryview:
    """Puts the file where the first huge page of `reserved` could begin; both are unmapped with the view's last part.

    The view is writable, whatever `protection` is. Raises OSError.
    """
    begin: int = np.frombuffer(reserved, np.uint8).__array_interface__["data"][0]
    address = begin + -begin % HUGE_PAGE_BYTES
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    if libc.mmap(address, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapped = (ctypes.c_ubyte * size_bytes).from_address(address)
    vars(mapped)["reserved"] = reserved  # every view keeps `mapped`, and that keeps the addresses
    return memoryview(mapped).cast("B")


def address_of(view: memoryview) -> int:
    """Where a writable view, of one byte at least, begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def has_shrink_seal(descriptor: int) -> bool:
    """Whether the file behind `descriptor` can never get shorter, so that reading a mapping of it is safe."""
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError as error:
        if error.errno == errno.EINVAL:  # not a memfd: it has no seals
            return False
        raise


def _allocate(size_bytes: int) -> tuple[int | None, memoryview]:
    """Returns (descriptor, view) of zeroed memory, sealed; descriptor None where it cannot be sealed."""
    if not hasattr(os, "memfd_create"):
        return None, memoryview(mmap.mmap(-1, size_bytes))
    descriptor = os.memfd_create("staffetta-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        view = map_file(descriptor, size_bytes, protection=mmap.PROT_READ | mmap.PROT_WRITE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno == errno.EINVAL:  # a kernel that lacks one of the seals
            return None, memoryview(mmap.mmap(-1, size_bytes))
        raise
    return descriptor, view


def _probe_pattern() -> bytes:
    """PROBE_BYTES bytes, no two words of 8 alike, so that a shifted or repeated part is seen."""
    words = np.arange(1, PROBE_BYTES // 8 + 1, dtype="<u8")
    return (words * np.uint64(0x9E3779B97F4A7C15)).tobytes()
