"""The bound on what a gateway does at once, and the wait for its end.

Whatever a client can make this process spend memory or time on is held here from the beginning: a body that is being
read, a call to the tokenizer, a request until its last token. A request of several choices counts as many times: each
has text, tokens and a worker's memory of its own, and one client's fan-out must not take what a bound leaves to others.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from staffetta.errors import DrainingError, InvalidRequestError, QueueFullError

log = logging.getLogger(__name__)


class Admission:
    """What is under way, at most `max_held` at once. Event loop only."""

    def __init__(self, max_held: int) -> None:
        self._max_held = max_held
        self._held: dict[object, int] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_draining = False

    @contextmanager
    def held(self, num_choices: int = 1) -> Iterator[None]:
        """Counts its body as `num_choices` under way.

        Raises QueueFullError or DrainingError instead of beginning it, InvalidRequestError when it could never begin.
        """
        if self.is_draining:
            raise DrainingError("the gateway is about to end; send the request to another one")
        if num_choices > self._max_held:
            raise InvalidRequestError(
                f"n is {num_choices} and this gateway holds at most {self._max_held} choices; lower it", param="n"
            )
        num_held = sum(self._held.values())
        if num_held + num_choices > self._max_held:
            raise QueueFullError(
                f"the gateway holds {num_held} requests, of {self._max_held} that it may, each choice counted; "
                "send the request again later"
            )
        this = object()
        self._held[this] = num_choices
        self._is_idle.clear()
        try:
            yield
        finally:
            del self._held[this]
            if not self._held:
                self._is_idle.set()

    async def drain(self, *, timeout_s: float) -> None:
        """Admits nothing more; returns when what is under way has ended, or `timeout_s` later."""
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            log.warning("%d requests had not ended after %g s", len(self._held), timeout_s)
