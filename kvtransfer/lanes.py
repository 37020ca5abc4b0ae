"""Carries out reads in threads: one thread for each lane, parts in the order they came, one future for each read.

The promise that leases rest on: a read's future resolves after its last part has ended, never before, whatever happens
to the lanes; and once the lanes are cut, no part begins.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from kvtransfer.frames import FrameError
from staffetta.errors import TransportError

log = logging.getLogger(__name__)


class Part(Protocol):
    """What a lane moves in one go."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the part moves."""


PartT = TypeVar("PartT", bound=Part)
PartT_contra = TypeVar("PartT_contra", bound=Part, contravariant=True)


class Lane(Protocol[PartT_contra]):
    """What one thread reads through: a connection, a mapping."""

    def move(self, part: PartT_contra) -> None:
        """Moves one part and blocks meanwhile.

        A TransportError fails that read alone. Anything else breaks the lanes: all outstanding reads fail, later ones
        are refused.
        """

    def cut(self) -> None:
        """Makes a blocked `move` return soon. Does not block; called from any thread, maybe more than once."""

    def close(self) -> None:
        """Gives up what the lane uses. Called once, last, on the lane's own thread; `cut` runs only before."""


class _Read:
    """One read in progress: counts its parts down and keeps the first error. Lanes call it, each from its thread."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.future: Future[int] = Future()
        self.future.set_running_or_notify_cancel()  # from here on nobody can cancel it: the blocks are in use
        self._num_bytes = sum(part.num_bytes for part in parts)
        self._num_pending = len(parts)
        self._error: TransportError | None = None
        self._lock = threading.Lock()
        if not parts:
            self.future.set_result(0)

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def end_part(self, error: TransportError | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._num_pending -= 1
            is_over = self._num_pending == 0
        if not is_over:
            return
        if self._error is None:
            self.future.set_result(self._num_bytes)
        else:
            self.future.set_exception(self._error)


class Lanes(Generic[PartT]):
    """A reader's threads. Thread-safe."""

    def __init__(self, lanes: Sequence[Lane[PartT]], *, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[_Read, PartT] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = list(lanes)  # not yet closed; under the lock
        self._broken: str | None = None  # why no part begins any more; set once, under the lock
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"{name}-{index}", daemon=True)
            for index, lane in enumerate(lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, parts: Sequence[PartT]) -> "Future[int]":
        """Queues one read. No parts is a read that has ended."""
        with self._lock:
            if self._broken is None:
                read = _Read(parts)
                for part in parts:
                    self._queue.put((read, part))
                return read.future
        return failed_read(TransportError(self._broken))

    def close(self) -> None:
        """Cuts the lanes and waits for every future to resolve; idempotent. On a lane's own thread it only cuts."""
        self._break("the transport was closed")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _break(self, reason: str) -> TransportError:
        """Lets no further part begin, for the first `reason` given; returns the error for parts that did not end."""
        with self._lock:
            if self._broken is None:
                self._broken = reason
                for _ in self._threads:
                    self._queue.put(None)  # behind every read that was ever submitted
            for lane in self._open:
                lane.cut()
            return TransportError(self._broken)

    def _run(self, lane: Lane[PartT]) -> None:
        while (item := self._queue.get()) is not None:
            read, part = item
            read.end_part(self._move(read, part, lane))
        with self._lock:
            self._open.remove(lane)
            lane.close()

    def _move(self, read: _Read, part: PartT, lane: Lane[PartT]) -> TransportError | None:
        if self._broken is not None:
            return TransportError(self._broken)
        if read.has_failed:
            return None  # its first error is the one to report
        try:
            lane.move(part)
        except TransportError as error:
            return error
        except (EOFError, OSError, FrameError) as error:
            log.info("%s: broken: %s", self._name, error)
            return self._break("the connection to the peer broke")
        except Exception:
            log.exception("%s: a read raised", self._name)
            return self._break("reading failed on this side")
        return None


def failed_read(error: TransportError) -> "Future[int]":
    """A read that failed before it began."""
    future: Future[int] = Future()
    future.set_exception(error)
    return future
