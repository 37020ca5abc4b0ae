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
from kvtransfer.memory import HUGE_PAGE_BYTES, PoolMemory
from worker.pool_pages import RESERVE_BYTES, PoolPages, collapse_pages, populate_pages

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


def refuse(part: memoryview) -> None:
    """A kernel that has no huge pages for shared memory."""
    assert len(part) == HUGE_PAGE_BYTES
    raise OSError(errno.EINVAL, "Invalid argument")


def plenty() -> int:
    return RESERVE_BYTES


def short_after(num_looks: int) -> Callable[[], int]:
    looks = iter([RESERVE_BYTES] * num_looks)
    return lambda: next(looks, RESERVE_BYTES - 1)


def shared_pages_kib() -> int:
    """This process's resident pages of shared memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssShmem"))


def huge_pages_kib() -> int:
    """This process's shared memory that is mapped in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped"))


def test_every_byte_of_a_pool_is_touched_in_the_order_of_its_blocks() -> None:
    memory = PoolMemory(5, MIB // 2 + 4096)
    record = Recorder(memory)
    run_to_end(PoolPages(memory, populate=record, collapse=refuse, headroom=plenty))
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
    run_to_end(PoolPages(memory, populate=record, collapse=refuse, headroom=plenty))
    assert record.parts == [(0, PART)]
    assert [each.getMessage() for each in caplog.records] == [
        "the KV pool has small pages from byte 0 on: [Errno 22] Invalid argument",
        f"the last {4 * MIB - PART} bytes of the KV pool are left to the steps: [Errno 22] Invalid argument",
    ]


def test_where_memory_is_short_nothing_more_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker.pool_pages")
    memory = make_pool(140)
    record = Recorder(memory)
    run_to_end(PoolPages(memory, populate=record, collapse=refuse, headroom=short_after(2)))
    assert sum(size for _, size in record.parts) == 128 * MIB
    assert [each.getMessage() for each in caplog.records[1:]] == [
        f"the last {12 * MIB} bytes of the KV pool are left to the steps: fewer than {RESERVE_BYTES} bytes of memory "
        "are left"
    ]


class Kernel:
    """Notes what it is asked for, and answers every huge page with the next of `answers`: an error's number or 0."""

    def __init__(self, *answers: int) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answers = iter(answers)

    def populate(self, part: memoryview) -> None:
        self.asked.append(("small", len(part)))

    def collapse(self, part: memoryview) -> None:
        self.asked.append(("huge", len(part)))
        if number := next(self._answers):
            raise OSError(number, os.strerror(number))

    def asked_for(self, num_bytes: int) -> list[tuple[str, int]]:
        memory = PoolMemory(num_bytes // 4096, 4096)
        run_to_end(PoolPages(memory, populate=self.populate, collapse=self.collapse, headroom=plenty))
        return self.asked


HUGE, SMALL = ("huge", HUGE_PAGE_BYTES), ("small", PART)


def test_a_pool_gets_huge_pages_and_small_ones_where_the_last_has_no_room() -> None:
    assert Kernel(0, 0).asked_for(2 * HUGE_PAGE_BYTES + PART + 8192) == [HUGE, HUGE, SMALL, ("small", 8192)]
    assert Kernel().asked_for(HUGE_PAGE_BYTES - 4096)[0] == SMALL


def test_a_huge_page_that_is_held_by_others_is_left_small_and_the_next_is_asked_for() -> None:
    assert Kernel(errno.EAGAIN, 0).asked_for(2 * HUGE_PAGE_BYTES) == [HUGE, *[SMALL] * 8, HUGE]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM])
def test_a_kernel_without_huge_pages_is_asked_for_one_only_once(number: int) -> None:
    assert Kernel(0, number).asked_for(3 * HUGE_PAGE_BYTES) == [HUGE, HUGE, *[SMALL] * 16]


NONE_NOW = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EBUSY})
"""No huge page is free, or somebody holds a small one that would move there."""


def collapse_or_skip(part: memoryview, *, skip_at: frozenset[int]) -> None:
    """Makes a huge page, unless the machine has none to give."""
    try:
        collapse_pages(part)
    except OSError as error:
        if error.errno not in skip_at:
            raise
        pytest.skip(f"no huge page for shared memory here: {error}")


@on_linux
def test_a_huge_page_is_made_of_nothing_and_of_what_lies_there_already() -> None:
    memory = make_pool(4)
    memory.buffer[5 * 4096 : 5 * 4096 + 5] = b"baton"
    before = huge_pages_kib()
    collapse_or_skip(memory.buffer[:HUGE_PAGE_BYTES], skip_at=NONE_NOW | {errno.EINVAL})  # or there never is one
    assert bytes(memory.buffer[5 * 4096 : 5 * 4096 + 5]) == b"baton"
    assert bytes(memory.buffer[:4096]) == bytes(4096)
    collapse_or_skip(memory.buffer[HUGE_PAGE_BYTES:], skip_at=NONE_NOW)
    assert bytes(memory.buffer[HUGE_PAGE_BYTES:]) == bytes(HUGE_PAGE_BYTES)
    assert huge_pages_kib() - before == 2 * HUGE_PAGE_BYTES // 1024


def test_stopping_ends_it_after_the_part_in_progress() -> None:
    memory = make_pool(8)
    began, may_go_on = threading.Event(), threading.Event()
    parts = []

    def populate(part: memoryview) -> None:
        parts.append(len(part))
        began.set()
        assert may_go_on.wait(10.0)

    pages = PoolPages(memory, populate=populate, collapse=refuse, headroom=plenty)
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
    pages = PoolPages(
        memory, populate=lambda _: policies.add(os.sched_getscheduler(0)), collapse=refuse, headroom=plenty
    )
    run_to_end(pages)
    assert policies == {os.SCHED_OTHER}, "one that yields to others keeps them waiting for what it holds"
