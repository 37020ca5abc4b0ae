"""Faults at named places, for tests of what must survive them. Nothing happens unless a worker was configured so.

A spec is `NAME:ACTION:NTH`: at the NTH time (from 1) that `hit(NAME)` is called in this process, ACTION happens: `kill`
(SIGKILL), `stop` (SIGSTOP) or `raise`. With the action `on`, `is_on(NAME)` is true from the NTH time on: the place
itself knows what to spoil.
"""

import os
import signal
from dataclasses import dataclass

ACTIONS = ("kill", "stop", "raise", "on")

FORM = f"NAME:ACTION:NTH with ACTION one of {', '.join(ACTIONS)}"
"""What a spec looks like."""


class FailpointError(RuntimeError):
    """Raised by a failpoint whose action is `raise`."""


@dataclass(slots=True)
class _Armed:
    action: str
    remaining: int


_armed: dict[str, _Armed] = {}


def parse(spec: str) -> tuple[str, str, int]:
    """Name, action and count of a spec. Raises ValueError for one that is none."""
    name, _, rest = spec.partition(":")
    action, _, nth = rest.partition(":")
    if not name or action not in ACTIONS or not (nth.isascii() and nth.isdecimal()) or int(nth) < 1:
        raise ValueError(f"failpoint {spec!r} is not {FORM}")
    return name, action, int(nth)


def arm(specs: tuple[str, ...]) -> None:
    """Arms this process's failpoints, replacing earlier ones. Raises ValueError for a spec that is not one."""
    armed: dict[str, _Armed] = {}
    for spec in specs:
        name, action, nth = parse(spec)
        armed[name] = _Armed(action, nth)
    _armed.clear()
    _armed.update(armed)


def hit(name: str) -> None:
    """Marks that execution passed the place `name`."""
    if not _armed or (armed := _armed.get(name)) is None:
        return
    armed.remaining -= 1
    if armed.remaining != 0:
        return
    if armed.action == "on":
        return
    if armed.action == "raise":
        raise FailpointError(name)
    os.kill(os.getpid(), signal.SIGKILL if armed.action == "kill" else signal.SIGSTOP)


def is_armed(name: str) -> bool:
    """Whether anything will happen at `name`; costs nothing and counts nothing."""
    return name in _armed


def is_on(name: str) -> bool:
    """Marks that execution passed the place `name`, and says whether it should spoil something now."""
    hit(name)
    armed = _armed.get(name)
    return armed is not None and armed.action == "on" and armed.remaining <= 0
