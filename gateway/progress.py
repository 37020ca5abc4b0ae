"""One request under way: since when, how far, and which tokens came when. The journey makes it, the relay moves it on.

Outlives the attempts: what a client has been sent stays sent when the worker is lost and another goes on.
"""

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

from gateway.metrics import Metrics
from gateway.output import PromptOutput
from gateway.request import JourneyRequest
from staffetta.errors import DeadlineError

T = TypeVar("T")


class Progress:
    """What is known of one request. Event loop only."""

    def __init__(self, request: JourneyRequest) -> None:
        self.id: Final = request.id
        self.arrival: Final = request.arrival
        self.deadline: Final = request.deadline
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        """Generated tokens of all choices."""
        self.prompt = PromptOutput()
        self.numerics_digest = ""
        """That of the worker whose numbers the client has; empty while it has none, and any worker may go on."""
        self.outcome = "abort"
        self._now = asyncio.get_running_loop().time
        self._last_token_at: dict[int, float] = {}

    def tokens_came(self, choice_index: int, num_tokens: int, metrics: Metrics) -> None:
        """Notes output of a choice, and observes the time since what came before it."""
        now = self._now()
        if self.num_tokens == 0:
            metrics.time_to_first_token.observe(now - self.arrival)
        if num_tokens and (last := self._last_token_at.get(choice_index)) is not None:
            metrics.inter_token_latency.observe((now - last) / num_tokens, count=num_tokens)
        self.num_tokens += num_tokens
        self._last_token_at[choice_index] = now

    async def within_deadline(self, awaitable: Awaitable[T], phase: str) -> T:
        """Awaits, for no longer than the deadline allows. Raises DeadlineError that names the phase."""
        if self.deadline is None:
            return await awaitable
        try:
            async with asyncio.timeout_at(self.deadline):
                return await awaitable
        except TimeoutError:
            raise DeadlineError(f"the deadline passed while {phase}; allow more time or ask for less") from None
