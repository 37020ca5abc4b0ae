"""Runs an async test where nothing may fail unseen, and nothing of it goes on afterwards."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec

from tests.loop import run as run_in_shared_loop

P = ParamSpec("P")

LIMIT_S = 30.0


def in_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Makes an async test an ordinary one. An exception in a callback, or of a task that nobody awaits, fails it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        unseen: list[str] = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(
                lambda _, context: unseen.append(f"{context['message']}: {context.get('exception')!r}")
            )
            before = asyncio.all_tasks()
            try:
                async with asyncio.timeout(LIMIT_S):
                    await test(*args, **kwargs)
            finally:
                left = asyncio.all_tasks() - before
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

        run_in_shared_loop(main())
        assert unseen == [], "; ".join(unseen)

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until `condition` holds; the test's own limit bounds it."""
    while not condition():  # noqa: ASYNC110 (what is waited for has no event)
        await asyncio.sleep(0.001)
