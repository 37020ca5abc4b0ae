"""Processes as the kernel lists them: who descends from whom, in what state, and which bearer of an id is meant.

Reads /proc alone. It never sends a signal.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_STATE, _PARENT, _USER_TIME, _SYSTEM_TIME, _STARTED = 0, 1, 11, 12, 19
"""Fields of `stat` after the command's name, from 0; see proc(5)."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process. Ids are given again; an id and when it was `started`, in ticks since boot, are not."""

    pid: int
    parent: int
    started: int
    cpu_s: float
    """Processor time so far, of all its threads."""
    state: str
    """One letter: R runs, S sleeps, D waits for a device, T is stopped, Z has ended and was not waited for."""

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from every other process."""
        return self.pid, self.started


def read_process(pid: int) -> Process | None:
    """The process with that id; None when there is none."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].decode().split()  # a name may hold blanks, parentheses, and any byte
    ticks = int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])
    return Process(
        pid=pid,
        parent=int(fields[_PARENT]),
        started=int(fields[_STARTED]),
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        state=fields[_STATE],
    )


def owner(pid: int) -> int | None:
    """The user whom the process runs as; None when there is no such process."""
    try:
        return (_PROC / str(pid)).stat().st_uid
    except FileNotFoundError:
        return None


def process_tree(pid: int) -> tuple[Process, ...]:
    """The process and all its descendants at this moment, parents before children; empty when it is gone."""
    children: defaultdict[int, list[Process]] = defaultdict(list)
    for path in _PROC.iterdir():
        if path.name.isdigit() and (found := read_process(int(path.name))) is not None:
            children[found.parent].append(found)
    root = read_process(pid)
    tree = [root] if root is not None else []
    for process in tree:  # grows while it is walked
        tree += children[process.pid]
    return tuple(tree)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time so far of the processes and their living descendants."""
    return sum(process.cpu_s for pid in pids for process in process_tree(pid))
