"""The memory that limits are measured on."""

import mmap
import re
from pathlib import Path

import pytest

from bench import limits

NUM_BYTES = 2**22


def mapping_of(address: int) -> tuple[str, list[str]]:
    """The permissions and the flags of the mapping that an address is in, as smaps(5) has them."""
    permissions = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ", line):
            first, end = int(found[1], 16), int(found[2], 16)
            permissions = found[3] if first <= address < end else ""
        elif permissions and line.startswith("VmFlags:"):
            return permissions, line.split()[1:]
    raise LookupError(hex(address))


def test_memory_to_read_is_private_and_asks_for_huge_pages() -> None:
    memory = limits.huge_pages(NUM_BYTES)
    assert memory.shape == (NUM_BYTES // 8,)
    permissions, flags = mapping_of(memory.data_ptr() + NUM_BYTES // 2)
    assert permissions == "rw-p"
    assert "hg" in flags


def test_a_system_without_huge_pages_has_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    assert limits.huge_pages(NUM_BYTES).sum() == NUM_BYTES // 8
