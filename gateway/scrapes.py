"""The metrics of a gateway's children: asked for, kept, added up for whoever scrapes.

One sum is under way at a time, and everybody who asks meanwhile gets it: anybody may ask, at every child's door, and a
sum costs the parent milliseconds for each child. Never raises: a gateway without metrics still serves. Event loop only.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Final

from prometheus_client.core import Metric

from gateway.pulls import Pulls
from gateway.totals import Totals
from staffetta.v1 import gateway_pb2

SCRAPE_S: Final = 1.0
"""How long a scrape waits for children that are busy; the page then has what they told last."""

log = logging.getLogger(__name__)


class Scrapes:
    """What the children count, each known by its index."""

    def __init__(
        self,
        *,
        serving: Callable[[], Iterable[int]],
        tell: Callable[[gateway_pb2.ParentMessage], None],
        own: Callable[[], Iterable[Metric]],
    ) -> None:
        """`serving` gives the children that can be asked, `tell` asks them, `own` is what the parent itself counts."""
        self._serving = serving
        self._tell = tell
        self._own = own
        self._totals = Totals()
        self._pages: dict[int, bytes] = {}
        self._pulls: Pulls[int] = Pulls()
        self._sum: asyncio.Task[bytes] | None = None

    async def page(self) -> bytes:
        """The metrics of all: of a busy child as it told them last, of an ended one what it had counted. Empty when
        they cannot be added up."""
        if self._sum is None or self._sum.done():
            self._sum = asyncio.create_task(self._add_up(), name="scrape")
        return await asyncio.shield(self._sum)  # who gives up does not end it for the others

    async def pull(self, timeout_s: float) -> Collection[int]:
        """Asks every child for its metrics; returns when they have answered or ended, or `timeout_s` later: who has not
        answered."""
        number = self._pulls.ask(self._serving())
        self._tell(gateway_pb2.ParentMessage(pull=gateway_pb2.PullMetrics(number=number)))
        return await self._pulls.wait(number, timeout_s=timeout_s)

    def answered(self, index: int, page: gateway_pb2.MetricsPage) -> None:
        """Keeps what a child has told."""
        self._pages[index] = page.text
        self._pulls.answered(index, page.number)

    def gone(self, index: int) -> None:
        """Notes that a child has ended: its counts stay, its gauges do not."""
        self._pulls.gone(index)
        try:
            self._totals.retire(self._pages.pop(index, b""))
        except Exception:
            log.exception("what process %d has counted is lost", index)

    async def _add_up(self) -> bytes:
        await self.pull(SCRAPE_S)
        try:
            return self._totals.page([page for page in self._pages.values() if page], self._own())
        except Exception:
            log.exception("the metrics of the processes cannot be added up")
            return b""
