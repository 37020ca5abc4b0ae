"""How much memory this process could take: what the system has left, and what its control groups leave it.

Only reads what the kernel says. Files that are missing, or say nothing, bound nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = _PROC) -> int:
    """Memory that can be had without swapping: free, and what the system's own caches would give back."""
    meminfo = proc / "meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def headroom_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """The least of what is available and what each control group of this process has left.

    A group's use includes file caches that it would give back, so there may be more.
    """
    return min([available_bytes(proc), *_left_in_groups(proc, cgroup)])


def _left_in_groups(proc: Path, cgroup: Path) -> Iterator[int]:
    """Bytes left in every control group with a limit, from the process's own to the outermost that is visible."""
    membership = proc / "self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            mount, names = cgroup, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            # In a container the path may be one of the host's, and the container's own group is the mount itself.
            limit, used = (_number(mount / group.relative_to("/") / name) for name in names)
            if limit is not None and used is not None:
                yield max(0, limit - used)


def _number(file: Path) -> int | None:
    """What a control file holds; None for "max", or when there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
