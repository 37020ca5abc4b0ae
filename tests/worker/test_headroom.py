"""How much memory a process could take is read from the kernel's files, and what cannot be read bounds nothing."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from worker.headroom import Headroom, available_bytes, headroom, headroom_bytes

MIB = 2**20
UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


def make_root(
    root: Path, files: Mapping[str, object], *, available_mib: int = 100, membership: str = "", mounts: str = UNIFIED
) -> Path:
    """A root directory with these files; those of control groups are named from `sys/fs/cgroup` on."""
    meminfo = f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    {available_mib * 1024} kB"
    written: dict[str, object] = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    written |= {"proc/meminfo": meminfo, "proc/self/cgroup": membership, "proc/self/mountinfo": mounts}
    for name, content in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_memory_that_caches_would_give_back_counts_as_available(tmp_path: Path) -> None:
    assert available_bytes(make_root(tmp_path, {}, available_mib=5)) == 5 * MIB


def test_without_meminfo_free_pages_are_available(tmp_path: Path) -> None:
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes(tmp_path) == pytest.approx(pages, rel=0.2)


def test_without_control_groups_everything_available_is_headroom(tmp_path: Path) -> None:
    root = make_root(tmp_path, {"memory.max": MIB, "memory.current": 0}, available_mib=2)
    assert headroom(root) == Headroom(2 * MIB, "bytes of memory are available")


def test_a_group_with_a_limit_leaves_what_it_does_not_use(tmp_path: Path) -> None:
    files = {"a/memory.max": 50 * MIB, "a/memory.current": 20 * MIB}
    root = make_root(tmp_path, files, membership="0::/a")
    why = f"bytes are left of the {50 * MIB} that control group {root}/sys/fs/cgroup/a may take"
    assert headroom(root) == Headroom(30 * MIB, why)


def test_caches_of_files_are_given_back_before_a_group_has_nothing_left(tmp_path: Path) -> None:
    stat = f"anon 1\nfile {9 * MIB}\ninactive_file {2 * MIB}\nactive_file {3 * MIB}\nshmem {4 * MIB}"
    files = {"memory.max": 50 * MIB, "memory.current": 20 * MIB, "memory.stat": stat}
    assert headroom_bytes(make_root(tmp_path, files, membership="0::/")) == 35 * MIB


def test_the_tightest_of_all_groups_counts_outer_ones_included(tmp_path: Path) -> None:
    files = {
        "a/memory.max": 50 * MIB,
        "a/memory.current": 45 * MIB,
        "a/b/memory.max": "max",
        "a/b/memory.current": 7,
        "a/b/c/memory.max": 40 * MIB,
        "a/b/c/memory.current": 10 * MIB,
    }
    assert headroom_bytes(make_root(tmp_path, files, membership="0::/a/b/c")) == 5 * MIB


def test_groups_of_version_1_are_read_under_their_names(tmp_path: Path) -> None:
    stat = f"inactive_file 7\ntotal_inactive_file {2 * MIB}\ntotal_active_file {MIB}"
    files = {
        "memory/a/memory.limit_in_bytes": 9 * MIB,
        "memory/a/memory.usage_in_bytes": 8 * MIB,
        "memory/a/memory.stat": stat,
    }
    mounts = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    root = make_root(tmp_path, files, membership="5:cpu:/a\n4:memory:/a\n0::/", mounts=mounts)
    assert headroom_bytes(root) == 4 * MIB


@pytest.mark.parametrize(("most", "high", "left"), [("max", 10, 3), (9, "max", 2), (9, 8, 1), (8, 10, 1)])
def test_a_group_that_is_slowed_down_before_its_limit_has_no_more_to_take_than_that(
    most: int | str, high: int | str, left: int, tmp_path: Path
) -> None:
    files = {
        "memory.max": most * MIB if isinstance(most, int) else most,
        "memory.high": high * MIB if isinstance(high, int) else high,
        "memory.current": 7 * MIB,
    }
    assert headroom_bytes(make_root(tmp_path, files, membership="0::/")) == left * MIB


@pytest.mark.parametrize("odd", ["active_file", "", "active_file x", " 7", "active_file 1 2", "active_file  7", "½ ½"])
def test_an_odd_line_of_what_a_group_uses_counts_for_nothing(odd: str, tmp_path: Path) -> None:
    files = {"memory.max": 9 * MIB, "memory.current": 8 * MIB, "memory.stat": f"{odd}\ninactive_file {MIB}"}
    assert headroom_bytes(make_root(tmp_path, files, membership="0::/")) == 2 * MIB


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_bytes_that_are_no_text_bound_nothing(name: str, tmp_path: Path) -> None:
    root = make_root(tmp_path, {"memory.max": 9 * MIB, "memory.current": 8 * MIB}, membership="0::/")
    (root / "sys/fs/cgroup" / name).write_bytes(b"\xff\xfe")
    assert headroom_bytes(root) == (MIB if name == "memory.stat" else 100 * MIB)


@pytest.mark.parametrize("line", [b"MemAvailable:", b"MemAvailable: x kB", b"MemAvailable", b"", b"\xff\xfe"])
def test_where_meminfo_does_not_say_what_is_available_free_pages_are(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_bytes(line)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes(tmp_path) == pytest.approx(pages, rel=0.2)


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": 9 * MIB, "memory.current": 10 * MIB}
    assert headroom_bytes(make_root(tmp_path, files, membership="0::/")) == 0


def test_this_process_has_headroom() -> None:
    assert 0 < headroom_bytes() <= available_bytes() * 1.2
