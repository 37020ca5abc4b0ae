"""Waits for what another process will show, and says what it showed instead when it never does."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

_POLL_S: Final = 0.02


def wait_until(look: Callable[[], T], is_reached: Callable[[T], bool], *, timeout_s: float) -> T:
    """The first value of `look` that `is_reached` accepts. Raises AssertionError with the last value when none is."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if is_reached(seen):
            return seen
        if time.monotonic() >= deadline:
            raise AssertionError(f"not reached within {timeout_s:g} s; last seen: {seen}")
        time.sleep(_POLL_S)
