"""The control groups that this process is in, and the processor time that they leave it; versions 1 and 2.

A container's limits are here and nowhere else: it sees all of the machine's CPUs and memory. Only reads what the kernel
says. Files that are missing, or say nothing, bound nothing; nor does a line that is not as the kernel writes them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

Controller = Literal["cpu", "memory"]

ROOT: Final = Path("/")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """One group of the process, by the directory of its files; their names depend on the version."""

    directory: Path
    version: Literal[1, 2]

    def text(self, name: str) -> str:
        """What a control file says, without the line's end; empty when it cannot be read."""
        return kernel_text(self.directory / name).strip()

    def number(self, name: str) -> int | None:
        """The whole number that a control file holds; None for `max`, or when it holds none."""
        return _number(self.text(name))

    def figures(self, name: str) -> dict[str, int]:
        """What a control file of lines `NAME NUMBER` says; other lines are left out."""
        lines = (line.partition(" ") for line in self.text(name).splitlines())
        return {key: number for key, _, text in lines if (number := _number(text)) is not None}


def control_groups(controller: Controller, root: Path = ROOT) -> Iterator[ControlGroup]:
    """The groups that may bound what `controller` counts, from the process's own to the outermost that is visible.

    `root` is where `proc` and the mounted hierarchies are found.
    """
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        version: Literal[1, 2] = 2 if number == "0" else 1
        if not path.startswith("/") or (version == 1 and controller not in names.split(",")):
            continue
        for mount in _mounts(root, version, controller):
            own = mount.place_of(PurePosixPath(path))
            for place in (own, *own.parents):
                yield ControlGroup(root / mount.point.relative_to("/") / place, version)


def kernel_text(file: Path) -> str:
    """What a file of the kernel's says, empty when it cannot be read. Bytes that are no UTF-8 become surrogates."""
    try:
        return file.read_text(errors="surrogateescape")
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return ""


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs whose whole time this process may use, by the tightest of its groups, such as 1.5; None for all."""
    quotas = (_quota(group) for group in control_groups("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: ControlGroup) -> float | None:
    if group.version == 2:
        of_group, _, of_time = group.text("cpu.max").partition(" ")
        quota, period = _number(of_group), _number(of_time)
    else:
        quota, period = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    if quota is None or quota < 0 or period is None or period <= 0:
        return None  # it is `max`, -1 or missing
    return quota / period


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy, or the part of it below `top`, as it is visible at `point`."""

    top: PurePosixPath
    point: PurePosixPath

    def place_of(self, group: PurePosixPath) -> PurePosixPath:
        """Where a group is, below `point`. One that is not there is a host's name for what is mounted: `point`."""
        return group.relative_to(self.top) if group.is_relative_to(self.top) else PurePosixPath()


def _mounts(root: Path, version: Literal[1, 2], controller: Controller) -> Iterator[_Mount]:
    """Reads mountinfo: `ID PARENT DEVICE TOP POINT OPTIONS [TAG…] - TYPE SOURCE OPTIONS`, blanks as octal numbers."""
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, kind = line.partition(" - ")
        parts = place.split(" ")
        if len(parts) < 5 or not parts[4].startswith("/"):
            continue
        top, point = (PurePosixPath(_OCTAL.sub(_octal, part)) for part in parts[3:5])
        file_system, _, options = kind.partition(" ")
        is_unified = version == 2 and file_system == "cgroup2"
        if is_unified or (version == 1 and file_system == "cgroup" and controller in re.split("[ ,]", options)):
            yield _Mount(top, point)


def _octal(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


def _lines(file: Path) -> list[str]:
    return kernel_text(file).splitlines()


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None
