"""A pool's pages are touched in the order of its blocks, no byte changes, and a failure does no harm."""

import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtransfer.layout import BlockId
from kvtransfer.memory import PoolMemory
from worker.pool_pages import RESERVE_BYTES, PoolPages, populate_pages

MIB = 2**20
PART = 2**18
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_WRITE is Linux's")


def make_pool(num_mib: int) -> PoolMemory:
    return PoolMemory(num_mib * 16, MIB // 16)


def run_to_end(pages: PoolPages) -> None:
    pages.start()
    pages._thread.join(timeout=10.0)
    assert not pages._thread.is_alive()
    pages.stop()


class Recorder:
    """Notes what it is asked to populate: each part's place in the pool, in bytes."""

    def __init__(self, memory: PoolMemory, *, fails_at: int | None = None) -> None:
        self.parts: list[tuple[int, int]] = []
        self._memory = memory
        self._fails_at = fails_at

    def __call__(self, part: memoryview) -> None:
        if len(self.parts) == self._fails_at:
            raise OSError(errno.EINVAL, "Invalid argument")
        begin = sum(size for _, size in self.parts)
        self._memory.buffer[begin] = 7
        assert part[0] == 7  # the same byte of the same pool
        self.parts.append((begin, len(part)))


def plenty() -> int:
    return RESERVE_BYTES


def short_after(num_looks: int) -> Callable[[], int]:
    looks = iter([RESERVE_BYTES] * num_looks)
    return lambda: next(looks, RESERVE_BYTES - 1)


def shared_pages_kib() -> int:
    """This process's resident pages of shared memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssShmem"))


def test_every_byte_of_a_pool_is_touched_in_the_order_of_its_blocks() -> None:
    memory = PoolMemory(5, MIB // 2 + 4096)
    record = Recorder(memory)
    run_to_end(PoolPages(memory, populate=record, headroom=plenty))
    sizes = [size for _, size in record.parts]
    assert sizes == [PART] * 10 + [5 * 4096]
    assert [begin for begin, _ in record.parts] == [PART * number for number in range(11)]


@on_linux
def test_touched_pages_exist_and_keep_their_bytes() -> None:
    memory = make_pool(8)
    memory.block(BlockId(3))[:] = bytes([9]) * memory.page_bytes
    before = shared_pages_kib()
    run_to_end(PoolPages(memory, headroom=plenty))
    assert shared_pages_kib() - before >= 7 * 1024
    assert bytes(memory.block(BlockId(3))) == bytes([9]) * memory.page_bytes
    assert memory.block(BlockId(4))[0] == 0


@on_linux
def test_pages_that_cannot_be_populated_are_an_error_with_its_number() -> None:
    mapping = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    with pytest.raises(OSError, match="Invalid argument") as raised:
        populate_pages(memoryview(mapping)[1:])  # not where a page begins
    assert raised.value.errno == errno.EINVAL


def test_a_kernel_that_refuses_is_told_once_and_nothing_else_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker.pool_pages")
    memory = make_pool(4)
    record = Recorder(memory, fails_at=1)
    run_to_end(PoolPages(memory, populate=record, headroom=plenty))
    assert record.parts == [(0, PART)]
    assert [each.getMessage() for each in caplog.records] == [
        f"the last {4 * MIB - PART} bytes of the KV pool are left to the steps: [Errno 22] Invalid argument"
    ]


def test_where_memory_is_short_nothing_more_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker.pool_pages")
    memory = make_pool(140)
    record = Recorder(memory)
    run_to_end(PoolPages(memory, populate=record, headroom=short_after(2)))
    assert sum(size for _, size in record.parts) == 128 * MIB
    assert [each.getMessage() for each in caplog.records] == [
        f"the last {12 * MIB} bytes of the KV pool are left to the steps: fewer than {RESERVE_BYTES} bytes of memory "
        "are left"
    ]


def test_stopping_ends_it_after_the_part_in_progress() -> None:
    memory = make_pool(8)
    began, may_go_on = threading.Event(), threading.Event()
    parts = []

    def populate(part: memoryview) -> None:
        parts.append(len(part))
        began.set()
        assert may_go_on.wait(10.0)

    pages = PoolPages(memory, populate=populate, headroom=plenty)
    pages.start()
    assert began.wait(10.0)
    stopping = threading.Thread(target=pages.stop)
    stopping.start()
    assert pages._is_stopping.wait(10.0)
    may_go_on.set()
    stopping.join(10.0)
    pages.stop()
    assert parts == [PART]


def test_one_that_was_never_started_can_be_stopped() -> None:
    pages = PoolPages(make_pool(1))
    pages.stop()
    pages.stop()


@on_linux
def test_it_runs_with_the_priority_of_all_others() -> None:
    memory = make_pool(1)
    policies: set[int] = set()
    run_to_end(PoolPages(memory, populate=lambda _: policies.add(os.sched_getscheduler(0)), headroom=plenty))
    assert policies == {os.SCHED_OTHER}, "one that yields to others keeps them waiting for what it holds"
