"""Two functions that use all cores, timed in turns so that neither meets the threads of the other."""

import statistics
import time
from collections.abc import Callable
from typing import Final

Clock = Callable[[], float]

_WARM_S: Final = 0.03
"""A turn begins with calls that do not count: threads that slept wake on whatever core, and the system takes some
milliseconds to spread them, which in a model the operations before have long done."""
_TIMED_S: Final = 0.03
_REST_S: Final = 0.05
"""And ends with a rest: threads that wait spin for a moment, OpenMP's for tens of milliseconds, on the other's core."""


def alternate(
    first: Callable[[], object], second: Callable[[], object], *, seconds: float, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Median seconds of a call of each on `clock`, in turns for about `seconds`, at least three each."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 3 or time.perf_counter() < end:
        for function, durations in zip((first, second), times, strict=True):
            _take_turn(function, durations, clock)
        turns += 1
    return statistics.median(times[0]), statistics.median(times[1])


def _take_turn(function: Callable[[], object], durations: list[float], clock: Clock) -> None:
    began = time.perf_counter()
    while time.perf_counter() < began + _WARM_S:
        function()
    began = time.perf_counter()
    while time.perf_counter() < began + _TIMED_S:
        start = clock()
        function()
        durations.append(clock() - start)
    time.sleep(_REST_S)
