"""Has the kernel find and clear the pages of a KV pool before a step writes to them, huge ones where it can.

A pool's memory comes into being where it is first written to, which steps would pay for: 45 ms of 512 prompt tokens of
the 0.5B shape. Here one thread that rests more than it works asks for the pages, in the order in which the pool hands
out its blocks. It never changes a byte, and never fails a worker: where the kernel refuses, or memory runs short, the
rest is left to the steps.

Shared memory gets huge pages only by being asked for each (MADV_COLLAPSE), whatever the system's settings; what lies
there already moves along. Where there is none to be had, small ones do.

The thread has no lower priority than others: while it asks it holds what other threads of the process wait for, and one
that the system then leaves aside keeps them waiting for seconds.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from kvtransfer.memory import HUGE_PAGE_BYTES, PoolMemory, address_of
from worker.headroom import headroom_bytes

log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 2**18
"""Of small pages, asked for at a time: while the kernel works on it, nobody else in the process can map memory."""
_LOOK_BYTES: Final = 256 * _CHUNK_BYTES
"""Touched between two looks at what is left of memory."""
_LEAST_REST_S: Final = 0.001
_REST: Final = 3.0
"""Times as long as it worked it rests, at least."""
RESERVE_BYTES: Final = 2**28
"""Memory that others may need meanwhile: with less than that left, the rest of the pool is not asked for."""
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14: as if each page were written to, without writing."""
_MADV_COLLAPSE: Final = 25
"""Linux 6.1: puts what is there into a huge page."""


class PoolPages:
    """Touches a pool's pages once, on a thread of its own. `start` and `stop` belong to one thread."""

    def __init__(
        self,
        memory: PoolMemory,
        *,
        populate: Callable[[memoryview], None] | None = None,
        collapse: Callable[[memoryview], None] | None = None,
        headroom: Callable[[], int] = headroom_bytes,
    ) -> None:
        """`populate` makes the pages of a part of the pool exist, `collapse` one huge page; or they raise OSError."""
        self._buffer = memory.buffer
        self._populate = populate or populate_pages
        self._collapse: Callable[[memoryview], None] | None = collapse or collapse_pages
        """None once the kernel has refused."""
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
            while begin < num_bytes:
                if begin % _LOOK_BYTES == 0 and self._headroom() < RESERVE_BYTES:
                    reason = f"fewer than {RESERVE_BYTES} bytes of memory are left"
                    break
                began = time.monotonic()
                begin += self._touch(begin)
                if self._is_stopping.wait(max(_LEAST_REST_S, _REST * (time.monotonic() - began))):
                    return
        except OSError as error:
            reason = str(error)
        if reason:
            log.info("the last %d bytes of the KV pool are left to the steps: %s", num_bytes - begin, reason)

    def _touch(self, begin: int) -> int:
        """Makes the pages from `begin` on exist, a huge one where one begins; returns their bytes. Raises OSError."""
        huge = self._buffer[begin : begin + HUGE_PAGE_BYTES]
        if self._collapse is not None and begin % HUGE_PAGE_BYTES == 0 and len(huge) == HUGE_PAGE_BYTES:
            try:
                self._collapse(huge)
            except OSError as error:
                if error.errno != errno.EAGAIN:  # somebody held a page of it; else no other will do either
                    self._collapse = None
                    log.info("the KV pool has small pages from byte %d on: %s", begin, error)
            else:
                return len(huge)
        small = huge[:_CHUNK_BYTES]
        self._populate(small)
        return len(small)


def populate_pages(part: memoryview) -> None:
    """Makes the pages under `part`, which begins at a page's beginning, exist. Raises OSError where that fails."""
    _advise(part, _MADV_POPULATE_WRITE)


def collapse_pages(part: memoryview) -> None:
    """Makes `part` one huge page, which it must be in place and size. Raises OSError where that fails."""
    _advise(part[: mmap.PAGESIZE], _MADV_POPULATE_WRITE)  # where nothing is, nothing can be collapsed
    _advise(part, _MADV_COLLAPSE)


def _advise(part: memoryview, advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address_of(part)), ctypes.c_size_t(len(part)), advice) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
