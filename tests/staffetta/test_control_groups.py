"""What control groups leave to this process, read from trees of files as the kernel lays them out."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from staffetta.control_groups import control_groups, cpu_quota
from staffetta.cpus import usable_threads

UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
OF_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
OF_MEMORY = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def make_root(root: Path, *, membership: str, mounts: str, files: Mapping[str, object]) -> Path:
    """A root directory with these files; those of control groups are named from `sys/fs/cgroup` on."""
    written = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    written |= {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts}
    for name, content in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_a_quota_is_a_share_of_its_period(tmp_path: Path) -> None:
    files = {"a/cpu.max": "150000 100000"}
    assert cpu_quota(make_root(tmp_path, membership="0::/a", mounts=UNIFIED, files=files)) == 1.5


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"a/cpu.max": "40000 20000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "300000 100000"}
    assert cpu_quota(make_root(tmp_path, membership="0::/a/b/c", mounts=UNIFIED, files=files)) == 2.0


@pytest.mark.parametrize("text", ["max 100000", "", "100000", "5 0", "-1 100000", "x y", "1 2 3", "9" * 5000 + " 1"])
def test_a_file_that_names_no_quota_bounds_nothing(text: str, tmp_path: Path) -> None:
    root = make_root(tmp_path, membership="0::/a", mounts=UNIFIED, files={"a/cpu.max": text})
    assert cpu_quota(root) is None


@pytest.mark.parametrize(("quota", "expected"), [(50_000, 0.5), (-1, None)])
def test_groups_of_version_1_have_their_own_names_and_place(quota: int, expected: float | None, tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/a/cpu.cfs_quota_us": quota,
        "cpu,cpuacct/a/cpu.cfs_period_us": 100_000,
        "memory/a/cpu.cfs_quota_us": 1,
        "memory/a/cpu.cfs_period_us": 100_000,
    }
    mounts = f"{OF_MEMORY}\n{OF_CPU}"
    assert cpu_quota(make_root(tmp_path, membership="4:cpu,cpuacct:/a", mounts=mounts, files=files)) == expected


def test_both_versions_may_be_mounted_at_once(tmp_path: Path) -> None:
    mounts = f"{OF_MEMORY}\n{UNIFIED.replace('cgroup rw', 'cgroup/unified rw')}\n{OF_CPU}"
    membership = "2:cpu,cpuacct:/a\n1:name=systemd:/\n0::/b"
    files = {
        "cpu,cpuacct/a/cpu.cfs_quota_us": 300_000,
        "cpu,cpuacct/a/cpu.cfs_period_us": 100_000,
        "unified/b/cpu.max": "250000 100000",
    }
    root = make_root(tmp_path, membership=membership, mounts=mounts, files=files)
    assert cpu_quota(root) == 2.5
    places = [
        (group.directory.relative_to(root / "sys/fs/cgroup"), group.version) for group in control_groups("cpu", root)
    ]
    expected = [("cpu,cpuacct/a", 1), ("cpu,cpuacct", 1), ("unified/b", 2), ("unified", 2)]
    assert places == [(Path(place), version) for place, version in expected]


@pytest.mark.parametrize("path", ["/pods/of/the/host", "/"])
def test_in_a_container_the_mount_itself_is_its_group(path: str, tmp_path: Path) -> None:
    files = {"cpu.max": "70000 100000", "pods/of/the/host/cpu.max": "10000 100000"}
    mounts = UNIFIED.replace("0:28 /", "0:28 /docker/ab")
    assert cpu_quota(make_root(tmp_path, membership=f"0::{path}", mounts=mounts, files=files)) == 0.7


def test_a_mounted_part_of_the_hierarchy_is_looked_at_from_where_it_begins(tmp_path: Path) -> None:
    files = {"inner/cpu.max": "70000 100000", "docker/ab/inner/cpu.max": "10000 100000"}
    mounts = UNIFIED.replace("0:28 /", "0:28 /docker/ab")
    assert cpu_quota(make_root(tmp_path, membership="0::/docker/ab/inner", mounts=mounts, files=files)) == 0.7


def test_blanks_in_a_mount_point_are_octal_numbers(tmp_path: Path) -> None:
    mounts = UNIFIED.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/our\040own")
    files = {"our own/cpu.max": "70000 100000"}
    assert cpu_quota(make_root(tmp_path, membership="0::/", mounts=mounts, files=files)) == 0.7


ODD_MOUNTS = ["garbage", "", "31 23 0:28 /", "31 23 0:28 / - cgroup2 cgroup2 rw", "a b c / here - cgroup2 c rw", " - "]


@pytest.mark.parametrize("odd", [*ODD_MOUNTS, UNIFIED.replace("/sys", r"/\000sys")])
def test_odd_mounts_are_passed_over(odd: str, tmp_path: Path) -> None:
    files = {"a/cpu.max": "150000 100000"}
    root = make_root(tmp_path, membership="0::/a", mounts=f"{odd}\n{UNIFIED}", files=files)
    assert cpu_quota(root) == 1.5


@pytest.mark.parametrize("odd", ["garbage", "", "0", "0:", "0::", "4:cpu", ":::"])
def test_odd_memberships_bound_nothing(odd: str, tmp_path: Path) -> None:
    root = make_root(tmp_path, membership=odd, mounts=f"{UNIFIED}\n{OF_CPU}", files={"cpu.max": "1 2"})
    assert list(control_groups("cpu", root)) == []


@pytest.mark.parametrize("place", ["proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/cpu.max"])
def test_bytes_that_are_no_text_bound_nothing(place: str, tmp_path: Path) -> None:
    root = make_root(tmp_path, membership="0::/", mounts=UNIFIED, files={"cpu.max": "1 2"})
    (root / place).write_bytes(b"\xff\xfe 1")
    assert cpu_quota(root) is None


def test_a_file_that_may_not_be_read_bounds_nothing(tmp_path: Path) -> None:
    root = make_root(tmp_path, membership="0::/", mounts=UNIFIED, files={"cpu.max": "1 2"})
    (root / "proc/self/mountinfo").unlink()
    (root / "proc/self/mountinfo").mkdir()
    assert cpu_quota(root) is None


def test_without_control_groups_nothing_is_bounded(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert list(control_groups("memory", tmp_path)) == []


def test_this_process_may_use_a_processor() -> None:
    cpus = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    assert quota is None or quota > 0
    assert 1 <= usable_threads(cpus, quota) <= cpus
    groups = list(control_groups("memory"))
    assert not Path("/proc/self/cgroup").exists() or all(group.directory.is_absolute() for group in groups)
