"""Has the kernel find and clear the pages of a KV pool before a step writes to them.

A pool's memory comes into being where it is first written to, which steps would pay for: 45 ms of 512 prompt tokens of
the 0.5B shape. Here one thread that rests more than it works asks for the pages, in the order in which the pool hands
out its blocks. It never changes a byte, and never fails a worker: where the kernel refuses, or memory runs short, the
rest is left to the steps.

The thread has no lower priority than others: while it asks it holds what other threads of the process wait for, and one
that the system then leaves aside keeps them waiting for seconds.
"""

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from kvtransfer.memory import PoolMemory
from worker.headroom import headroom_bytes

log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 2**18
"""Asked for at a time: while the kernel works on it, nobody else in the process can map memory."""
_LOOK_BYTES: Final = 256 * _CHUNK_BYTES
"""Touched between two looks at what is left of memory."""
_LEAST_REST_S: Final = 0.001
_REST: Final = 3.0
"""Times as long as it worked it rests, at least."""
RESERVE_BYTES: Final = 2**28
"""Memory that others may need meanwhile: with less than that left, the rest of the pool is not asked for."""
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14: as if each page were written to, without writing."""


class PoolPages:
    """Touches a pool's pages once, on a thread of its own. `start` and `stop` belong to one thread."""

    def __init__(
        self,
        memory: PoolMemory,
        *,
        populate: Callable[[memoryview], None] | None = None,
        headroom: Callable[[], int] = headroom_bytes,
    ) -> None:
        """`populate` makes the pages of a part of the pool exist, or raises OSError."""
        self._buffer = memory.buffer
        self._populate = populate or populate_pages
        self._headroom = headroom
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="pool-pages", daemon=True)

    def start(self) -> None:
        """Begins; once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the part in progress and waits for that. Idempotent."""
        self._is_stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._buffer = memoryview(b"")

    def _main(self) -> None:
        begin, num_bytes, reason = 0, len(self._buffer), ""
        try:
            for begin in range(0, num_bytes, _CHUNK_BYTES):
                if begin % _LOOK_BYTES == 0 and self._headroom() < RESERVE_BYTES:
                    reason = f"fewer than {RESERVE_BYTES} bytes of memory are left"
                    break
                began = time.monotonic()
                self._populate(self._buffer[begin : begin + _CHUNK_BYTES])
                if self._is_stopping.wait(max(_LEAST_REST_S, _REST * (time.monotonic() - began))):
                    return
        except OSError as error:
            reason = str(error)
        if reason:
            log.info("the last %d bytes of the KV pool are left to the steps: %s", num_bytes - begin, reason)


def populate_pages(part: memoryview) -> None:
    """Makes the pages under `part`, which begins at a page's beginning, exist. Raises OSError where that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(part))
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(part)), _MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
