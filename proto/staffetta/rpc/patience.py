"""A bound on how long each of many reads may wait, at the price of one timer for all of them.

`asyncio.timeout` makes a timer for each read and drops it. Where every token is a message, and its reader's code has
been pushed out of the caches since the last one, that is a tenth of what the reader spends on it; here the timer is
left alone until it rings, and then set to when the read that waits by now has waited for too long.

So a process that has stood still cancels its read some turns of the loop after it goes on, not in the first: by then
other things that were due have begun, a write of the same call among them. A read of gRPC's takes its call with it when
it is cancelled, and the write ends with a CancelledError that nobody asked for; `SessionPipe.run` knows that one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Patience:
    """Waits for one read at a time. Event loop only. Its timer may outlast the last read by that one's limit."""

    def __init__(self) -> None:
        self._reader: asyncio.Task[object] | None = None
        """Who waits now."""
        self._ends_at = 0.0
        """When the read that waits now, or waited last, has waited for too long."""
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self._has_ended = False
        """Whether the read that waits now is being cancelled, because it has waited for too long."""

    async def wait(self, read: Callable[[], Awaitable[T]], *, limit_s: float) -> T:
        """Awaits `read()`. Cancels it and raises TimeoutError when that takes longer than `limit_s`.

        What a read that is cancelled returns or raises instead comes out as it is. Raises RuntimeError, and reads
        nothing, while another read waits.
        """
        if self._reader is not None:
            raise RuntimeError("a read waits already: one that had too little patience would be ended in its place")
        loop = asyncio.get_running_loop()
        reader = asyncio.current_task()
        assert reader is not None, "a coroutine is run by a task"
        num_cancelled = reader.cancelling()
        self._ends_at = loop.time() + limit_s
        if self._timer is None or self._ends_at < self._rings_at:
            self._set_timer(loop)
        self._reader = reader
        try:
            return await read()
        except asyncio.CancelledError:
            # Somebody else may want the task to end as well; then it does.
            if self._has_ended and reader.cancelling() <= num_cancelled + 1:
                raise TimeoutError from None
            raise
        finally:
            if self._has_ended:
                reader.uncancel()
            self._reader = None
            self._has_ended = False

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = self._ends_at
        self._timer = loop.call_at(self._rings_at, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._reader is None:
            return  # the next read sets the timer
        if self._ends_at > self._rings_at:
            self._set_timer(loop)
        else:
            self._has_ended = True
            self._reader.cancel()
