"""The promise of `Lanes`: a future resolves after the last part of its read has ended, whatever happens."""

import threading
from dataclasses import dataclass, field

import pytest

from kvtransfer.lanes import Lanes
from staffetta.errors import TransportError

DEADLINE_S = 20.0  # never reached unless something hangs


@dataclass(frozen=True)
class Part:
    """A part that waits for its gate, then ends as it was told to."""

    num_bytes: int = 1
    error: BaseException | None = None
    gate: threading.Event | None = None
    has_begun: threading.Event = field(default_factory=threading.Event)


class FakeLane:
    """Moves parts by waiting; `cut` opens every gate it waits at."""

    def __init__(self) -> None:
        self.moved: list[Part] = []
        self.num_closed = 0
        self.closed_on = ""
        self._is_cut = threading.Event()

    def move(self, part: Part) -> None:
        self.moved.append(part)
        part.has_begun.set()
        if part.gate is not None and not part.gate.wait(DEADLINE_S):
            raise AssertionError("nobody opened the gate")
        if self._is_cut.is_set():
            raise EOFError
        if part.error is not None:
            raise part.error

    def cut(self) -> None:
        self._is_cut.set()

    def close(self) -> None:
        self.num_closed += 1
        self.closed_on = threading.current_thread().name


def test_a_read_resolves_with_the_bytes_of_all_its_parts() -> None:
    lanes = Lanes([FakeLane(), FakeLane()], name="test")
    assert lanes.submit([Part(3), Part(4), Part(5)]).result(DEADLINE_S) == 12
    lanes.close()


def test_a_failed_read_resolves_only_when_its_other_parts_have_ended() -> None:
    gate = threading.Event()
    lanes = Lanes([FakeLane(), FakeLane()], name="test")
    slow, refused, never_begun = Part(gate=gate), Part(error=TransportError("refused")), Part()
    future = lanes.submit([slow, refused, never_begun])
    assert slow.has_begun.wait(DEADLINE_S)
    assert refused.has_begun.wait(DEADLINE_S)
    behind = Part()
    assert lanes.submit([behind]).result(DEADLINE_S) == 1  # so the lane that was refused has gone past never_begun
    assert not future.done()
    gate.set()
    with pytest.raises(TransportError, match="refused"):
        future.result(DEADLINE_S)
    assert not never_begun.has_begun.is_set()
    lanes.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EOFError(), "the connection to the peer broke"),
        (ConnectionResetError(), "the connection to the peer broke"),
        (RuntimeError("a defect"), "reading failed on this side"),
    ],
)
def test_a_broken_lane_fails_all_reads_outstanding_and_later_ones(error: Exception, message: str) -> None:
    lane = FakeLane()
    lanes = Lanes([lane], name="test")
    gate = threading.Event()
    breaking = lanes.submit([Part(gate=gate, error=error)])
    outstanding = lanes.submit([Part(), Part()])
    gate.set()
    later = [outstanding, breaking]
    for future in later:
        with pytest.raises(TransportError, match=message):
            future.result(DEADLINE_S)
    with pytest.raises(TransportError, match=message):
        lanes.submit([Part()]).result(DEADLINE_S)
    assert len(lane.moved) == 1
    lanes.close()


def test_closing_cuts_waits_and_closes_each_lane_once_on_its_own_thread() -> None:
    lanes_list = [FakeLane(), FakeLane()]
    lanes = Lanes(lanes_list, name="test")
    gate = threading.Event()
    part = Part(gate=gate)
    future = lanes.submit([part])
    assert part.has_begun.wait(DEADLINE_S)
    closing = threading.Thread(target=lanes.close)
    closing.start()
    assert all(lane._is_cut.wait(DEADLINE_S) for lane in lanes_list)
    assert not future.done()  # the part is still being moved: its blocks are not free
    gate.set()
    closing.join()
    assert str(future.exception(0)) == "the transport was closed"
    lanes.close()
    assert [lane.num_closed for lane in lanes_list] == [1, 1]
    assert sorted(lane.closed_on for lane in lanes_list) == ["test-0", "test-1"]


def test_submissions_that_race_with_close_all_resolve() -> None:
    for _ in range(50):
        lanes = Lanes([FakeLane(), FakeLane()], name="test")
        closing = threading.Thread(target=lanes.close)
        closing.start()
        futures = [lanes.submit([Part(), Part()]) for _ in range(20)]
        closing.join()
        assert all(future.done() for future in futures)


def test_an_exception_in_a_callback_does_not_stop_the_lane() -> None:
    lanes = Lanes([FakeLane()], name="test")
    gate = threading.Event()
    future = lanes.submit([Part(gate=gate)])
    future.add_done_callback(lambda _: 1 // 0)
    gate.set()
    assert future.result(DEADLINE_S) == 1
    assert lanes.submit([Part()]).result(DEADLINE_S) == 1
    lanes.close()
