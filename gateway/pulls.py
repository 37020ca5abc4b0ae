"""Questions put to several at once, and who has not answered: the bookkeeping of a scrape. Event loop only."""

import asyncio
from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pulls(Generic[T]):
    """Questions by number, from 1 on, each to some of the same members."""

    def __init__(self) -> None:
        self._missing: dict[int, set[T]] = {}
        self._num_asked = 0
        self._change = asyncio.Event()

    def ask(self, members: Iterable[T]) -> int:
        """A new question's number. Who asks calls `wait` for it."""
        self._num_asked += 1
        self._missing[self._num_asked] = set(members)
        return self._num_asked

    def answered(self, member: T, number: int) -> None:
        """Notes an answer; one that nobody waits for any more is none."""
        if number in self._missing:
            self._missing[number].discard(member)
            self._notify()

    def gone(self, member: T) -> None:
        """Notes that a member will answer nothing that it was asked."""
        for missing in self._missing.values():
            missing.discard(member)
        self._notify()

    async def wait(self, number: int, *, timeout_s: float) -> Collection[T]:
        """Returns once everybody has answered or is gone, or `timeout_s` later: who is missing. Once a number."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._missing[number]:
                    await self._change.wait()
        except TimeoutError:
            return self._missing[number]
        else:
            return ()
        finally:
            del self._missing[number]

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
