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
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.child_ends import ChildEnd, ChildEndedError, ChildNotStartedError, is_final_at_start, is_final_later
from gateway.child_process import ChildProcess
from gateway.link import Link, LinkError
from gateway.membership import Worker
from gateway.scrapes import Scrapes
from staffetta.exits import OperatorError
from staffetta.restart import Backoff
from staffetta.v1 import gateway_pb2

PULL_S: Final = 1.0
"""Between two pulls of metrics, and how long one waits: what is lost with a child is what it counted meanwhile."""
MAX_UNANSWERED: Final = 10
"""Pulls in a row after which a child is taken for wedged: its event loop answers between any two things it does."""
START_S: Final = 60.0
"""What a child gets to open its doors: it imports, and reads the model's small files."""
_LAST_WORDS_S: Final = 2.0

ChildLink = Link[gateway_pb2.ChildMessage, gateway_pb2.ParentMessage]

log = logging.getLogger(__name__)


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
        self._ends: dict[str, int] = {}
        self._scrapes = Scrapes(
            serving=lambda: [child.index for child in self._children if child.is_ready],
            tell=self.tell,
            own=self._own_metrics,
        )
        self._change = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_started = False
        self.failure: Final[asyncio.Future[OperatorError]] = asyncio.get_running_loop().create_future()
        """Done once a child can be kept no more: the gateway has to end."""

    async def start(self) -> None:
        """Returns once every child's doors are open. Raises OperatorError when that will never be."""
        for child in self._children:
            self._spawn(self._keep(child), name=f"child-{child.index}")
        self._spawn(self._watch(), name="children-watch")
        while not all(child.is_ready for child in self._children):
            change = asyncio.create_task(self._change.wait())
            waits: set[asyncio.Future[Any]] = {change, self.failure}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            if self.failure.done():
                raise self.failure.result()
        self._has_started = True

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
            end: ChildEnd
            try:
                end = ChildEndedError(child.index, await self._live(child))
            except OSError as error:
                end = ChildNotStartedError(child.index, error)
            if self._stopping.is_set():
                return
            self._ends[end.how] = self._ends.get(end.how, 0) + 1
            child.num_early_ends = 0 if child.has_served else child.num_early_ends + 1
            if not child.has_served and self._is_final(end, child.num_early_ends):
                self._fail(end)
            delay_s = child.backoff.next_delay(asyncio.get_running_loop().time() - child.started_at)
            log.warning("%s; another starts in %.1f s", end.what, delay_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()

    async def _live(self, child: Child) -> int:
        """One life of a child, from its start to its end; its exit status. Raises OSError when it cannot begin."""
        child.started_at = asyncio.get_running_loop().time()
        child.has_served = False
        child.num_unanswered = 0
        ours, theirs = socket.socketpair()
        with theirs:
            link = await ChildLink.open(ours, gateway_pb2.ChildMessage)
            try:
                child.process = process = ChildProcess(link=theirs, listener=child.listener)
            except OSError:
                link.close()
                raise
        log.info("process %d has pid %d", child.index, process.pid)
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
            child.sessions = frozenset()
            self._scrapes.gone(child.index)
            link.close()
        # It has closed its end, and nothing else is left for it to do.
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                status = await process.wait()
        except TimeoutError:
            process.send(signal.SIGKILL)
            status = await process.wait()
        child.process = None
        return status

    def _is_final(self, end: ChildEnd, num_early_ends: int) -> bool:
        if self._has_started:
            return is_final_later(num_early_ends=num_early_ends)
        return is_final_at_start(end, num_early_ends=num_early_ends)

    def _fail(self, error: OperatorError) -> None:
        if not self.failure.done():
            self.failure.set_result(error)

    def _take(self, child: Child, said: gateway_pb2.ChildMessage) -> None:
        match said.WhichOneof("message"):
            case "ready":
                child.has_served = True
                log.info("process %d serves", child.index)
                self._notify()
            case "sessions":
                child.sessions = frozenset((each.worker_id, each.incarnation) for each in said.sessions.sessions)
            case "own_metrics":
                self._scrapes.answered(child.index, said.own_metrics)
            case "scrape":
                self._spawn(self._serve_scrape(child, said.scrape.number), name=f"scrape-{child.index}")

    async def _serve_scrape(self, child: Child, number: int) -> None:
        page = gateway_pb2.MetricsPage(number=number, text=await self._scrapes.page())
        self._send(child, gateway_pb2.ParentMessage(page=page))

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
            missing = await self._scrapes.pull(PULL_S)
            for child in self._children:
                # Pulls are counted, not seconds: those in which this process itself stood still are nobody's silence.
                child.num_unanswered = child.num_unanswered + 1 if child.index in missing else 0
                if child.process is None or self._stopping.is_set():
                    continue
                is_late = not child.has_served and now() - child.started_at > START_S
                if is_late or child.num_unanswered >= MAX_UNANSWERED:
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
            log.error("%s has failed", task.get_name(), exc_info=error)
            why, fix = "a defect, whose traceback is above", "staffetta gateway --log-level debug"
            self._fail(OperatorError("GATEWAY_PROCESS", f"{task.get_name()} has failed", why=why, fix=fix))

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        child.process.send(number)
