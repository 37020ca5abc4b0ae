"""The child processes of a gateway of several: started, told what they must know, asked for their metrics, restarted.

One task for each keeps it: a child that ends, for whatever reason, is followed by another in its place, on the same
listening socket, which the parent holds open meanwhile. A child that answers nothing is killed: while it lives, the
connections that the kernel gives it wait in vain. Never touches a request. Event loop only.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.child_process import ChildProcess
from gateway.link import Link, LinkError
from gateway.membership import Worker
from gateway.pulls import Pulls
from gateway.totals import Totals
from staffetta.exits import ExitCode, OperatorError
from staffetta.restart import Backoff, describe_status, final_code
from staffetta.v1 import gateway_pb2

PULL_S: Final = 1.0
"""Between two pulls of metrics, and how long one waits: what is lost with a child is what it counted meanwhile."""
MAX_UNANSWERED: Final = 10
"""Pulls in a row after which a child is taken for wedged: its event loop answers between any two things it does."""
START_S: Final = 60.0
"""What a child gets to open its doors: it imports, and reads the model's small files."""
SCRAPE_S: Final = 1.0
"""How long a scrape waits for children that are busy; the page then has what they told last."""
_LAST_WORDS_S: Final = 2.0

ChildLink = Link[gateway_pb2.ChildMessage, gateway_pb2.ParentMessage]

log = logging.getLogger(__name__)


class ChildEndedError(OperatorError):
    """A child ended before the gateway was ready, and would again."""

    def __init__(self, index: int, status: int, code: ExitCode) -> None:
        super().__init__(
            "GATEWAY_PROCESS",
            f"process {index} of the gateway ended by {describe_status(status)}, and would again",
            why="it has said why itself, above",
            fix="staffetta gateway --log-level debug",
        )
        self.exit_code = code


@dataclass(slots=True, eq=False)
class Child:
    """One child's place over all its lives, and its life now."""

    index: int
    listener: socket.socket
    """Its own socket of the REST door, which every life of it inherits."""
    process: ChildProcess | None = None
    link: ChildLink | None = None
    has_served: bool = False
    """In this life."""
    sessions: frozenset[tuple[str, str]] = frozenset()
    """Decode workers that it has a session to, each with its incarnation."""
    page: bytes = b""
    """Its metrics as it told them last."""
    num_unanswered: int = 0
    started_at: float = 0.0
    num_early_ends: int = 0
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def is_ready(self) -> bool:
        """Whether its doors are open."""
        return self.link is not None and self.has_served


class Children:
    """All children of one gateway."""

    def __init__(
        self,
        listeners: Iterable[socket.socket],
        *,
        start_of: Callable[[int], gateway_pb2.ChildStart],
        so_far: Callable[[], Iterable[gateway_pb2.ParentMessage]],
    ) -> None:
        """One child for each of `listeners`, which stay the caller's. `start_of` gives the first message to the child
        of an index, `so_far` what it is told next."""
        self._children = [Child(index, listener) for index, listener in enumerate(listeners)]
        self._start_of = start_of
        self._so_far = so_far
        self._totals = Totals()
        self._ends: dict[str, int] = {}
        self._pulls: Pulls[Child] = Pulls()
        self._change = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[OperatorError] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Returns once every child's doors are open. Raises OperatorError when that will never be."""
        for child in self._children:
            self._spawn(self._keep(child), name=f"child-{child.index}")
        self._spawn(self._watch(), name="children-watch")
        while not all(child.is_ready for child in self._children):
            change = asyncio.create_task(self._change.wait())
            waits: set[asyncio.Future[Any]] = {change, self._failure}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            if self._failure.done():
                raise self._failure.result()

    def tell(self, message: gateway_pb2.ParentMessage) -> None:
        """Sends a message to every child that has been told what came before it."""
        for child in self._children:
            if child.link is not None:
                self._send(child, message)

    def is_open_everywhere(self, worker: Worker) -> bool:
        """Whether every child that serves has a session to a worker."""
        session = (worker.worker_id, worker.announcement.identity.incarnation)
        serving = [child for child in self._children if child.is_ready]
        return bool(serving) and all(session in child.sessions for child in serving)

    async def scrape(self) -> bytes:
        """The metrics of all: of a busy child as it told them last, of an ended one what it had counted."""
        await self._pull(SCRAPE_S)
        return self._totals.page([child.page for child in self._children if child.page], self._own_metrics())

    def terminate(self) -> None:
        """Sends SIGTERM to every child: the first drains it, the second ends it at once. None starts again."""
        self._stopping.set()
        for child in self._children:
            _signal(child, signal.SIGTERM)

    async def wait(self) -> None:
        """Returns when every child has ended, after `terminate`."""
        tasks = [task for task in self._tasks if task.get_name() != "children-watch"]
        if tasks:
            await asyncio.wait(tasks)  # who gives up waiting does not end them

    async def close(self) -> None:
        """Ends every child at once, and returns when they are gone."""
        self._stopping.set()
        for child in self._children:
            _signal(child, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self.wait()
        for child in self._children:
            _signal(child, signal.SIGKILL)
        await self.wait()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, child: Child) -> None:
        """Keeps one child until everything ends."""
        while not self._stopping.is_set():
            status = await self._live(child)
            if self._stopping.is_set():
                return
            how = describe_status(status)
            self._ends[how] = self._ends.get(how, 0) + 1
            child.num_early_ends = 0 if child.has_served else child.num_early_ends + 1
            code = final_code(status, num_early_ends=child.num_early_ends)
            if code is not None and not child.has_served and not self._failure.done():
                self._failure.set_result(ChildEndedError(child.index, status, code))
            delay_s = child.backoff.next_delay(asyncio.get_running_loop().time() - child.started_at)
            log.warning("process %d ended by %s; it starts again in %.1f s", child.index, how, delay_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()

    async def _live(self, child: Child) -> int:
        """One life of a child, from its start to its end; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            child.started_at = asyncio.get_running_loop().time()
            child.has_served = False
            child.num_unanswered = 0
            child.process = process = ChildProcess(link=theirs, listener=child.listener)
            log.info("process %d has pid %d", child.index, process.pid)
        link = await ChildLink.open(ours, gateway_pb2.ChildMessage)
        if self._stopping.is_set():  # it was told of before there was a process to tell
            process.send(signal.SIGTERM)
        child.link = link
        self._send(child, gateway_pb2.ParentMessage(start=self._start_of(child.index)))
        for message in self._so_far():
            self._send(child, message)
        try:
            while (said := await link.receive()) is not None:
                self._take(child, said)
        except LinkError as error:
            log.error("process %d: %s", child.index, error)
        finally:
            child.link = None
            self._pulls.gone(child)
            link.close()
        # It has closed its end, and nothing else is left for it to do.
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                status = await process.wait()
        except TimeoutError:
            process.send(signal.SIGKILL)
            status = await process.wait()
        child.process = None
        self._retire(child)
        return status

    def _take(self, child: Child, said: gateway_pb2.ChildMessage) -> None:
        match said.WhichOneof("message"):
            case "ready":
                child.has_served = True
                log.info("process %d serves", child.index)
                self._notify()
            case "sessions":
                child.sessions = frozenset((each.worker_id, each.incarnation) for each in said.sessions.sessions)
            case "own_metrics":
                child.page = said.own_metrics.text
                self._pulls.answered(child, said.own_metrics.number)
            case "scrape":
                self._spawn(self._serve_scrape(child, said.scrape.number), name=f"scrape-{child.index}")

    async def _serve_scrape(self, child: Child, number: int) -> None:
        page = gateway_pb2.MetricsPage(number=number, text=await self.scrape())
        if child.link is not None:
            self._send(child, gateway_pb2.ParentMessage(page=page))

    async def _pull(self, timeout_s: float) -> Collection[Child]:
        """Asks every child for its metrics; returns when they have answered or ended, or `timeout_s` later: who has not
        answered."""
        number = self._pulls.ask(child for child in self._children if child.is_ready)
        self.tell(gateway_pb2.ParentMessage(pull=gateway_pb2.PullMetrics(number=number)))
        return await self._pulls.wait(number, timeout_s=timeout_s)

    def _retire(self, child: Child) -> None:
        self._totals.retire(child.page)
        child.page = b""
        child.sessions = frozenset()

    def _own_metrics(self) -> list[Metric]:
        serving = GaugeMetricFamily(
            "staffetta_gateway_processes",
            "Processes of the gateway that serve.",
            sum(c.is_ready for c in self._children),
        )
        ends = CounterMetricFamily(
            "staffetta_gateway_process_ends", "Processes of the gateway that ended by themselves.", labels=("by",)
        )
        for how, count in sorted(self._ends.items()):
            ends.add_metric((how,), count)
        return [serving, ends]

    async def _watch(self) -> None:
        """Pulls metrics, so that little is lost with a child, and kills one that answers nothing."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(PULL_S)
            missing = await self._pull(PULL_S)
            for child in self._children:
                # Pulls are counted, not seconds: those in which this process itself stood still are nobody's silence.
                child.num_unanswered = child.num_unanswered + 1 if child in missing else 0
                is_late = not child.has_served and now() - child.started_at > START_S
                if (is_late or child.num_unanswered >= MAX_UNANSWERED) and not self._stopping.is_set():
                    log.error("process %d does not answer and is killed", child.index)
                    _signal(child, signal.SIGKILL)

    def _send(self, child: Child, message: gateway_pb2.ParentMessage) -> None:
        """Sends to a child that has a link. One that does not read is killed; its keeper sees its end."""
        try:
            if child.link is not None:
                child.link.send(message)
        except LinkError as error:
            log.error("process %d: %s; it is killed", child.index, error)
            _signal(child, signal.SIGKILL)

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s is kept no more", task.get_name(), exc_info=error)

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        child.process.send(number)
