"""When a child is started again, and when never."""

import signal

import pytest

from staffetta.exits import ExitCode
from staffetta.restart import Backoff, describe_status, final_code


def test_delays_double_from_nothing_to_five_seconds() -> None:
    backoff = Backoff()
    assert [backoff.next_delay(0.0) for _ in range(10)] == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_a_long_life_forgives_earlier_failures() -> None:
    backoff = Backoff()
    assert [backoff.next_delay(lived_s) for lived_s in (0.0, 0.0, 9.9, 10.0, 0.0)] == [0.0, 0.1, 0.2, 0.0, 0.1]


def test_statuses_have_names() -> None:
    statuses = [0, 3, -signal.SIGKILL, -200]
    assert [describe_status(status) for status in statuses] == ["exit code 0", "exit code 3", "SIGKILL", "signal 200"]


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_lasting_cause_is_final_at_any_time(code: int) -> None:
    assert final_code(code, num_early_ends=0) == ExitCode(code)


@pytest.mark.parametrize("status", [0, 1, 6, -9])
def test_any_other_end_is_final_only_after_three_before_readiness(status: int) -> None:
    assert [final_code(status, num_early_ends=n) for n in range(4)] == [None, None, None, ExitCode.FAILURE]
