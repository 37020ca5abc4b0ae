"""One timer for many reads: who waits for too long is ended, nobody else is, and nobody else's cancelling is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pytest

from staffetta.rpc.patience import Patience
from tests.rpc.in_loop import in_loop

T = TypeVar("T")

LONG_S = 60.0


async def never() -> str:
    await asyncio.Event().wait()
    return "never"


async def soon() -> str:
    await asyncio.sleep(0)
    return "soon"


@dataclass
class Timer:
    """One of a stepped clock's."""

    rings_at: float
    ring: Callable[[], object]
    is_over: bool = False

    def cancel(self) -> None:
        """Keeps it from ringing."""
        self.is_over = True


class SteppedClock:
    """Time and timers of what a patience takes for its loop: it goes on only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers: list[Timer] = []
        self._now_s = 0.0
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def time(self) -> float:
        return self._now_s

    def call_at(self, when: float, callback: Callable[..., object], *arguments: object) -> Timer:
        self.timers.append(Timer(when, partial(callback, *arguments)))
        return self.timers[-1]

    def step(self, duration_s: float) -> None:
        """Lets time pass, and what is due ring."""
        self._now_s += duration_s
        for timer in [each for each in self.timers if each.rings_at <= self._now_s and not each.is_over]:
            timer.is_over = True
            timer.ring()


async def begun(waiting: Coroutine[object, object, T]) -> "asyncio.Task[T]":
    """A task that has come to where it waits for its read."""
    task = asyncio.create_task(waiting)
    await asyncio.sleep(0)
    return task


@in_loop
async def test_a_read_that_waits_for_too_long_is_cancelled() -> None:
    ended: list[str] = []

    async def read() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    task = asyncio.current_task()
    assert task is not None
    patience = Patience()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await patience.wait(read, limit_s=0.01)
        assert task.cancelling() == 0
    assert ended == ["cancelled", "cancelled"]
    assert await patience.wait(soon, limit_s=LONG_S) == "soon"


@in_loop
async def test_each_read_has_the_whole_time_though_one_timer_serves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, clock = Patience(), SteppedClock(monkeypatch)

    async def read() -> None:
        clock.step(20.0)
        await asyncio.sleep(0)

    for _ in range(4):  # together longer than one may take
        await patience.wait(read, limit_s=50.0)
    waiting = await begun(patience.wait(never, limit_s=50.0))
    clock.step(49.0)
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.step(1.0)
    with pytest.raises(TimeoutError):
        await waiting
    clock.timers.clear()
    for _ in range(100):
        await patience.wait(soon, limit_s=LONG_S)
    assert len(clock.timers) == 1


@in_loop
async def test_a_shorter_limit_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, clock = Patience(), SteppedClock(monkeypatch)
    await patience.wait(soon, limit_s=LONG_S)
    waiting = await begun(patience.wait(never, limit_s=1.0))
    clock.step(1.0)
    with pytest.raises(TimeoutError):
        await waiting
    assert [timer.is_over for timer in clock.timers] == [True, True]


@in_loop
async def test_a_timer_that_rings_when_nobody_reads_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, clock = Patience(), SteppedClock(monkeypatch)
    assert await patience.wait(soon, limit_s=1.0) == "soon"
    clock.step(1.0)
    assert [timer.is_over for timer in clock.timers] == [True]
    assert await patience.wait(soon, limit_s=LONG_S) == "soon"


@in_loop
async def test_who_is_cancelled_by_others_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, clock = Patience(), SteppedClock(monkeypatch)
    waits_again = asyncio.Event()

    async def wait_twice() -> None:
        with pytest.raises(TimeoutError):
            await patience.wait(never, limit_s=1.0)
        waits_again.set()
        await patience.wait(never, limit_s=LONG_S)

    waiting = await begun(wait_twice())
    clock.step(1.0)
    await waits_again.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    async def read() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            both.cancel()  # while the patience ends it

    both = await begun(patience.wait(read, limit_s=1.0))
    clock.step(1.0)
    with pytest.raises(asyncio.CancelledError):
        await both
    assert both.cancelling() == 1, "only what others asked for"


@in_loop
async def test_an_exception_of_the_read_comes_out_and_the_next_read_is_as_any() -> None:
    async def read() -> None:
        raise ConnectionResetError("gone")

    patience = Patience()
    with pytest.raises(ConnectionResetError, match="gone"):
        await patience.wait(read, limit_s=LONG_S)
    with pytest.raises(TimeoutError):
        await patience.wait(never, limit_s=0.01)


async def gone_when_cancelled() -> str:
    try:
        return await never()
    except asyncio.CancelledError:
        raise ConnectionResetError("gone") from None


async def last_when_cancelled() -> str:
    try:
        return await never()
    except asyncio.CancelledError:
        return "last"


@in_loop
async def test_a_read_that_ends_otherwise_when_it_is_cancelled_leaves_nobody_cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    patience = Patience()
    with pytest.raises(ConnectionResetError, match="gone"):
        await patience.wait(gone_when_cancelled, limit_s=0.01)
    assert task.cancelling() == 0
    assert await patience.wait(last_when_cancelled, limit_s=0.01) == "last"
    assert task.cancelling() == 0


@in_loop
async def test_a_second_read_at_a_time_is_refused_and_the_first_goes_on() -> None:
    patience, answer = Patience(), asyncio.Event()
    waiting = await begun(patience.wait(answer.wait, limit_s=LONG_S))
    with pytest.raises(RuntimeError, match="a read waits already"):
        await patience.wait(soon, limit_s=LONG_S)
    answer.set()
    assert await waiting is True
    assert await patience.wait(soon, limit_s=LONG_S) == "soon"
