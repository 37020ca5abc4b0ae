"""Sets of a machine's CPUs as text: `0-3,8`; how many threads they run. Pure."""

import math
import re
from collections.abc import Iterable, Sequence

FORM = "a CPU's number or a range of them, such as 0-3"
"""What each part looks like."""

_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def parse_cpus(parts: Sequence[str]) -> frozenset[int]:
    """The CPUs that all parts name together. Raises ValueError for a part that is none."""
    cpus: set[int] = set()
    for part in parts:
        match = _PART.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"{part!r} is not {FORM}")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> tuple[str, ...]:
    """The fewest parts that name `cpus`, in rising order."""
    runs: list[tuple[int, int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1] = (runs[-1][0], cpu)
        else:
            runs.append((cpu, cpu))
    return tuple(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def usable_threads(num_cpus: int, quota: float | None) -> int:
    """How many threads can compute on so many CPUs, within a quota of their time in CPUs; None: all of it.

    A part of a CPU counts as one: all together are stopped for the rest of a period only once they have used it up.
    """
    return num_cpus if quota is None else max(1, min(num_cpus, math.ceil(quota)))
