"""Failpoints happen when they were told to, once, and never by themselves."""

import os
import signal
from collections.abc import Iterator

import pytest

from staffetta import failpoint
from staffetta.failpoint import FailpointError


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    failpoint.arm(())
    yield
    failpoint.arm(())


def test_nothing_happens_unless_armed() -> None:
    failpoint.hit("anywhere")
    assert not failpoint.is_armed("anywhere")
    assert not failpoint.is_on("anywhere")


def test_an_action_happens_the_nth_time_and_only_then() -> None:
    failpoint.arm(("there:raise:3",))
    assert failpoint.is_armed("there")
    failpoint.hit("there")
    failpoint.hit("elsewhere")
    failpoint.hit("there")
    with pytest.raises(FailpointError, match="there"):
        failpoint.hit("there")
    failpoint.hit("there")


def test_a_switch_stays_on_from_the_nth_time() -> None:
    failpoint.arm(("spoil:on:2",))
    assert [failpoint.is_on("spoil") for _ in range(4)] == [False, True, True, True]


def test_a_raising_failpoint_is_no_switch() -> None:
    failpoint.arm(("there:raise:2",))
    assert failpoint.is_on("there") is False


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_process_is_ended_or_stopped_by_a_signal_to_itself(
    monkeypatch: pytest.MonkeyPatch, action: str, number: signal.Signals
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal_number: sent.append((pid, signal_number)))
    failpoint.arm((f"there:{action}:1",))
    failpoint.hit("there")
    assert sent == [(os.getpid(), number)]


def test_arming_replaces_what_was_armed() -> None:
    failpoint.arm(("one:raise:1",))
    failpoint.arm(("two:raise:1",))
    failpoint.hit("one")
    with pytest.raises(FailpointError):
        failpoint.hit("two")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "name",
        "name:raise",
        "name:raise:",
        ":raise:1",
        "name:explode:1",
        "name:raise:0",
        "name:raise:-1",
        "n:kill:x",
    ],
)
def test_a_spec_that_is_none_is_refused_and_arms_nothing(spec: str) -> None:
    failpoint.arm(("before:raise:1",))
    with pytest.raises(ValueError, match="is not NAME:ACTION:NTH"):
        failpoint.arm(("good:raise:1", spec))
    assert [failpoint.is_armed(name) for name in ("before", "good")] == [True, False]
