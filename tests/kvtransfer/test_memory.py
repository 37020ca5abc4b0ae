"""The pool's memory: bounds, sealing, and what others can do with a descriptor of it."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvtransfer import memory as memory_module
from kvtransfer.layout import BlockId
from kvtransfer.memory import HUGE_PAGE_BYTES, PROBE_BYTES, PoolMemory, address_of, has_shrink_seal, map_file


def test_pages_are_zero_adjacent_and_exactly_the_buffer() -> None:
    memory = PoolMemory(3, 100)
    assert memory.buffer.nbytes == 300
    assert bytes(memory.buffer) == bytes(300)
    memory.block(BlockId(1))[:] = b"\x07" * 100
    assert bytes(memory.buffer) == bytes(100) + b"\x07" * 100 + bytes(100)
    memory.close()


def test_block_ids_outside_the_pool_are_refused() -> None:
    memory = PoolMemory(3, 100)
    for block_id in (-1, 3):
        with pytest.raises(IndexError, match=f"block {block_id} is not in a pool of 3 blocks"):
            memory.block(BlockId(block_id))
    memory.close()


@pytest.mark.parametrize(("num_blocks", "page_bytes"), [(0, 16), (16, 0), (-1, 16)])
def test_a_pool_without_room_is_refused(num_blocks: int, page_bytes: int) -> None:
    with pytest.raises(ValueError, match="has no room"):
        PoolMemory(num_blocks, page_bytes)


def test_the_probe_is_the_same_in_every_pool_and_has_no_two_equal_words() -> None:
    small, large = PoolMemory(1, 8), PoolMemory(5, 1000)
    assert small.probe == large.probe
    assert len(set(small.probe.cast("Q"))) == PROBE_BYTES // 8
    assert small.probe.readonly
    small.close()
    large.close()


def test_a_shared_descriptor_reads_what_the_owner_writes() -> None:
    memory = PoolMemory(2, 4096)
    descriptor = memory.read_only_fd()
    mapping = mmap.mmap(descriptor, memory.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    memory.block(BlockId(1))[:5] = b"baton"
    assert mapping[4096:4101] == b"baton"
    mapping.close()
    os.close(descriptor)
    memory.close()


def num_mappings(name: str) -> int:
    """How many of this process's mappings are of a file of that name."""
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_pool_begins_where_a_huge_page_could() -> None:
    pools = [PoolMemory(3, 4096) for _ in range(5)]
    assert [address_of(pool.buffer) % HUGE_PAGE_BYTES for pool in pools] == [0] * 5


UNDER_A_LIMIT = """
import mmap, resource
from kvtransfer.memory import PoolMemory

made, make = [], mmap.mmap

def noted(descriptor, *arguments, **options):
    mapping = make(descriptor, *arguments, **options)
    made.append(descriptor)
    return mapping

mmap.mmap = noted
with open("/proc/self/statm") as figures:
    num_bytes = int(figures.read().split()[5]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_DATA, (num_bytes + 100 * 2**20,) * 2)
assert PoolMemory(300, 2**20).is_shareable
assert made == [-1], "its addresses were refused, so that it is mapped anywhere"
"""


def test_addresses_for_a_pool_are_no_data_of_the_process() -> None:
    subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], check=True)


def refuse_reserving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has room for files and none for the addresses round them."""
    map_anywhere = mmap.mmap

    def limited(descriptor: int, *arguments: int, **options: int) -> mmap.mmap:
        if descriptor == -1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return map_anywhere(descriptor, *arguments, **options)

    monkeypatch.setattr(mmap, "mmap", limited)


def test_where_no_addresses_can_be_reserved_a_pool_is_mapped_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_reserving(monkeypatch)
    memory = PoolMemory(2, 4096)
    descriptor = memory.read_only_fd()
    view = map_file(descriptor, memory.size_bytes, protection=mmap.PROT_READ)
    memory.block(BlockId(1))[:5] = b"baton"
    assert (memory.is_shareable, view.readonly, bytes(view[4096:4101])) == (True, True, b"baton")
    os.close(descriptor)


@pytest.mark.parametrize("size_bytes", [1, 4096, 5000, HUGE_PAGE_BYTES + 1])
def test_a_mapped_file_is_the_file_and_goes_with_its_last_view(size_bytes: int) -> None:
    descriptor = os.memfd_create("mapped-for-a-test")
    os.ftruncate(descriptor, size_bytes)
    os.pwrite(descriptor, b"x", size_bytes - 1)
    view = map_file(descriptor, size_bytes, protection=mmap.PROT_READ | mmap.PROT_WRITE)
    assert (len(view), view[size_bytes - 1]) == (size_bytes, ord("x"))
    view[0] = ord("y")
    assert os.pread(descriptor, 1, 0) == b"y"
    part = view[:1]
    del view
    assert num_mappings("mapped-for-a-test") == 1
    del part
    assert num_mappings("mapped-for-a-test") == 0
    os.close(descriptor)


def test_what_is_mapped_for_reading_is_a_view_that_refuses_to_be_written() -> None:
    memory = PoolMemory(2, 4096)
    descriptor = memory.read_only_fd()
    view = map_file(descriptor, memory.size_bytes, protection=mmap.PROT_READ)
    memory.block(BlockId(1))[:5] = b"baton"
    assert (view.readonly, bytes(view[4096:4101])) == (True, b"baton")
    with pytest.raises(PermissionError):
        map_file(descriptor, memory.size_bytes, protection=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(descriptor)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        map_file(descriptor, memory.size_bytes, protection=mmap.PROT_READ)


def test_a_shared_descriptor_cannot_be_written_or_mapped_writable() -> None:
    memory = PoolMemory(2, 4096)
    descriptor = memory.read_only_fd()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 4096)
    os.close(descriptor)
    memory.close()


def test_opening_the_descriptor_again_for_writing_does_not_get_round_the_seals() -> None:
    memory = PoolMemory(2, 4096)
    read_only = memory.read_only_fd()
    writable = os.open(f"/proc/self/fd/{read_only}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(writable, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(writable, 4096)
    for size_bytes in (0, memory.size_bytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(writable, size_bytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(read_only)
    os.close(writable)
    memory.close()


def test_views_outlive_close_and_sharing_does_not() -> None:
    memory = PoolMemory(2, 64)
    block = memory.block(BlockId(0))
    memory.close()
    memory.close()
    block[:5] = b"still"
    assert bytes(block[:5]) == b"still"
    assert not memory.is_shareable
    with pytest.raises(ValueError, match="cannot be shared"):
        memory.read_only_fd()


def test_without_memfd_the_memory_works_and_says_that_it_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    memory = PoolMemory(2, 64)
    assert not memory.is_shareable
    memory.block(BlockId(1))[:] = b"\x01" * 64
    assert bytes(memory.buffer) == bytes(64) + b"\x01" * 64
    with pytest.raises(ValueError, match="cannot be shared"):
        memory.read_only_fd()


def test_a_kernel_without_the_seals_gives_memory_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    num_descriptors = psutil.Process().num_fds()
    monkeypatch.setattr(memory_module, "F_SEAL_FUTURE_WRITE", 1 << 30)  # the kernel refuses seals it does not know
    memory = PoolMemory(2, 64)
    assert not memory.is_shareable
    assert psutil.Process().num_fds() == num_descriptors


def test_a_descriptor_that_is_no_memfd_or_not_sealed_has_no_shrink_seal() -> None:
    pipe_end, other_end = os.pipe()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    assert not has_shrink_seal(pipe_end)
    assert not has_shrink_seal(unsealed)
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert has_shrink_seal(unsealed)
    for descriptor in (pipe_end, other_end, unsealed):
        os.close(descriptor)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        has_shrink_seal(unsealed)
