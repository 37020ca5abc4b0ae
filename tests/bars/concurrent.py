"""Runs many coroutines, so many at a time, and keeps their order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


async def run_all(items: Sequence[T], work: Callable[[T], Awaitable[U]], *, num_at_once: int) -> list[U]:
    """`work` of every item, in the order of the items. The first failure ends everything."""
    gate = asyncio.Semaphore(num_at_once)

    async def guarded(item: T) -> U:
        async with gate:
            return await work(item)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guarded(item)) for item in items]
    return [task.result() for task in tasks]
