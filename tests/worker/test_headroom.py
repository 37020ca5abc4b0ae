"""How much memory a process could take is read from the kernel's files, and what cannot be read bounds nothing."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from worker.headroom import available_bytes, headroom_bytes

MIB = 2**20


def write(root: Path, files: Mapping[str, object]) -> Path:
    """Makes files below `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def make_proc(root: Path, *, available_mib: int = 100, cgroup: str = "") -> Path:
    meminfo = f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    {available_mib * 1024} kB"
    return write(root, {"meminfo": meminfo, "self/cgroup": cgroup})


def test_memory_that_caches_would_give_back_counts_as_available(tmp_path: Path) -> None:
    assert available_bytes(make_proc(tmp_path, available_mib=5)) == 5 * MIB


def test_without_meminfo_free_pages_are_available(tmp_path: Path) -> None:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes(tmp_path) == pytest.approx(pages, rel=0.2)


def test_without_control_groups_everything_available_is_headroom(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"meminfo": "MemAvailable: 2048 kB"})
    assert headroom_bytes(proc, tmp_path / "cgroup") == 2 * MIB


def test_a_group_with_a_limit_leaves_what_it_does_not_use(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", cgroup="0::/a")
    files = {"a/memory.max": 50 * MIB, "a/memory.current": 20 * MIB}
    assert headroom_bytes(proc, write(tmp_path / "cgroup", files)) == 30 * MIB


def test_the_tightest_of_all_groups_counts_outer_ones_included(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", cgroup="0::/a/b/c")
    files = {
        "a/memory.max": 50 * MIB,
        "a/memory.current": 45 * MIB,
        "a/b/memory.max": "max",
        "a/b/memory.current": 7,
        "a/b/c/memory.max": 40 * MIB,
        "a/b/c/memory.current": 10 * MIB,
    }
    assert headroom_bytes(proc, write(tmp_path / "cgroup", files)) == 5 * MIB


def test_groups_of_version_1_are_read_under_their_names(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", cgroup="5:cpu:/a\n4:memory:/a\n0::/")
    files = {"memory/a/memory.limit_in_bytes": 9 * MIB, "memory/a/memory.usage_in_bytes": 8 * MIB}
    assert headroom_bytes(proc, write(tmp_path / "cgroup", files)) == MIB


def test_in_a_container_the_mount_itself_is_its_group(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", cgroup="0::/pods/of/the/host")
    files = {"memory.max": 9 * MIB, "memory.current": 6 * MIB}
    assert headroom_bytes(proc, write(tmp_path / "cgroup", files)) == 3 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", cgroup="0::/")
    files = {"memory.max": 9 * MIB, "memory.current": 10 * MIB}
    assert headroom_bytes(proc, write(tmp_path / "cgroup", files)) == 0


def test_this_process_has_headroom() -> None:
    assert 0 < headroom_bytes() <= available_bytes() * 1.2
