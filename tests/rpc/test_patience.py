"""One timer for many reads: who waits for too long is ended, nobody else is, and nobody else's cancelling is lost."""

import asyncio

import pytest

from staffetta.rpc.patience import Patience
from tests.rpc.in_loop import in_loop

LONG_S = 60.0


async def never() -> str:
    await asyncio.Event().wait()
    return "never"


async def soon() -> str:
    await asyncio.sleep(0)
    return "soon"


class CountingLoop:
    """Counts the timers of the running loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_timers = 0
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counted(*arguments: object, **options: object) -> asyncio.TimerHandle:
            self.num_timers += 1
            return call_at(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_at", counted)


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
    patience, loop = Patience(), asyncio.get_running_loop()
    for _ in range(4):  # together longer than one may take
        await patience.wait(lambda: asyncio.sleep(0.02), limit_s=0.05)
    began = loop.time()
    with pytest.raises(TimeoutError):
        await patience.wait(never, limit_s=0.05)
    assert loop.time() - began >= 0.045
    counting = CountingLoop(monkeypatch)
    for _ in range(100):
        await patience.wait(soon, limit_s=LONG_S)
    assert counting.num_timers == 1


@in_loop
async def test_a_shorter_limit_counts_at_once() -> None:
    patience, loop = Patience(), asyncio.get_running_loop()
    await patience.wait(soon, limit_s=LONG_S)
    began = loop.time()
    with pytest.raises(TimeoutError):
        await patience.wait(never, limit_s=0.01)
    assert loop.time() - began < LONG_S / 2


@in_loop
async def test_a_timer_that_rings_when_nobody_reads_ends_nobody() -> None:
    patience = Patience()
    assert await patience.wait(soon, limit_s=0.001) == "soon"
    await asyncio.sleep(0.01)
    assert await patience.wait(lambda: asyncio.sleep(0.001, "later"), limit_s=LONG_S) == "later"


@in_loop
async def test_who_is_cancelled_by_others_is_cancelled() -> None:
    patience = Patience()

    async def wait_twice() -> None:
        with pytest.raises(TimeoutError):
            await patience.wait(never, limit_s=0.001)
        await patience.wait(never, limit_s=LONG_S)

    waiting = asyncio.create_task(wait_twice())
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    async def read() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            both.cancel()  # while the patience ends it

    both = asyncio.create_task(patience.wait(read, limit_s=0.01))
    with pytest.raises(asyncio.CancelledError):
        await both


@in_loop
async def test_an_exception_of_the_read_comes_out_and_the_next_read_is_as_any() -> None:
    async def read() -> None:
        raise ConnectionResetError("gone")

    patience = Patience()
    with pytest.raises(ConnectionResetError, match="gone"):
        await patience.wait(read, limit_s=LONG_S)
    with pytest.raises(TimeoutError):
        await patience.wait(never, limit_s=0.01)
