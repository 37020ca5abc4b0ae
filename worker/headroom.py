"""How much memory this process could take: what the system has left, and what its control groups leave it.

Only reads what the kernel says. Files that are missing, or say nothing, bound nothing; nor does a line that is not as
the kernel writes them.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from staffetta.control_groups import ROOT, ControlGroup, control_groups, kernel_text

_AVAILABLE: Final = re.compile(r"^MemAvailable: *([0-9]{1,18}) kB$", re.MULTILINE | re.ASCII)


class Headroom(NamedTuple):
    """Bytes that can still be taken, and the words that follow their number: what sets it."""

    num_bytes: int
    why: str


def headroom(root: Path = ROOT) -> Headroom:
    """The least of what is available and what each control group of this process has left.

    `root` is where `proc` and what is mounted are found.
    """
    available = Headroom(available_bytes(root), "bytes of memory are available")
    return min([available, *_left_in_groups(root)], key=lambda each: each.num_bytes)


def headroom_bytes(root: Path = ROOT) -> int:
    """As `headroom` says."""
    return headroom(root).num_bytes


def available_bytes(root: Path = ROOT) -> int:
    """Memory that can be had without swapping: free, and what the system's own caches would give back."""
    if available := _AVAILABLE.search(kernel_text(root / "proc/meminfo")):
        return int(available[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups(root: Path) -> Iterator[Headroom]:
    """What is left in every control group with a limit, from the process's own to the outermost that is visible."""
    for group in control_groups("memory", root):
        limits = [limit for name in _LIMITS[group.version] if (limit := group.number(name)) is not None]
        used = group.number(_USE[group.version])
        if limits and used is not None:
            limit = min(limits)
            left = max(0, limit - max(0, used - _file_bytes(group)))
            why = f"bytes are left of the {limit} that control group {group.directory} may take"
            yield Headroom(left, why)


_LIMITS: Final = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
"""By version: what a group may have; beyond `high` it is slowed down until it has less."""
_USE: Final = {1: "memory.usage_in_bytes", 2: "memory.current"}
"""By version: what a group has, caches of files included."""
_PREFIX: Final = {1: "total_", 2: ""}
"""By version: before a figure of a group and all below it."""


def _file_bytes(group: ControlGroup) -> int:
    """Caches of files, which a group at its limit gives back."""
    figures, prefix = group.figures("memory.stat"), _PREFIX[group.version]
    return sum(figures.get(f"{prefix}{name}", 0) for name in ("active_file", "inactive_file"))
