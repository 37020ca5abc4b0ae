"""The registered workers: who is there, how loaded they are, what they hold in cache, and the sessions to decode
workers.

Membership is what the registry's streams say and nothing else. A worker that left takes no new requests; its session
goes on until the requests on it have ended or it breaks by itself. Event loop only.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from typing import Final

from gateway.router import DecodeView, Route, Snapshot, WorkerView
from gateway.session import DecodeSession, run_session
from staffetta.errors import StaffettaError
from staffetta.v1 import common_pb2, registry_pb2

REOPEN_S: Final = 0.2

log = logging.getLogger(__name__)


class Worker:
    """One registered worker, changed by `Workers` alone."""

    def __init__(self, announcement: registry_pb2.WorkerAnnouncement) -> None:
        self.announcement: Final = announcement
        self.worker_id: Final = announcement.identity.worker_id
        self.load = registry_pb2.WorkerLoad()
        self.links: tuple[registry_pb2.PeerLink, ...] = ()
        self.cached_blocks: set[int] = set()
        self.session: DecodeSession | None = None
        self.keeper: asyncio.Task[None] | None = None
        self.has_left = False
        self.wants_snapshot = False
        self.last_chosen = 0
        self.num_routed_tokens = 0
        """Prompt tokens routed here since the last report, which cannot know of them yet."""

    @property
    def is_decode(self) -> bool:
        """Whether it generates tokens."""
        return self.announcement.identity.role == common_pb2.WORKER_ROLE_DECODE

    @property
    def block_size(self) -> int:
        """Token positions in one of its KV blocks."""
        return self.announcement.identity.layout.groups[0].block_size


class Workers:
    """All registered workers, and one task for each decode worker that keeps a session to it open."""

    def __init__(self, *, gateway_id: str, heartbeat_s: float) -> None:
        self._gateway_id = gateway_id
        self._heartbeat_s = heartbeat_s
        self._workers: dict[str, Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._num_choices = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(sorted(self._workers.values(), key=lambda worker: worker.worker_id))

    def join(self, announcement: registry_pb2.WorkerAnnouncement) -> Worker:
        """Registers a worker. Another of the same name has left by that: a restart is told apart by its incarnation."""
        worker = Worker(announcement)
        if (former := self._workers.get(worker.worker_id)) is not None:
            self.leave(former)
        self._workers[worker.worker_id] = worker
        if worker.is_decode:
            worker.keeper = self._spawn(self._keep_session(worker), name=f"session-{worker.worker_id}")
        log.info("%s joined: %s", worker.worker_id, announcement.backend)
        self._notify()
        return worker

    def leave(self, worker: Worker) -> None:
        """Removes a worker from routing. Idempotent, also after another has taken its name."""
        if worker.has_left:
            return
        worker.has_left = True
        del self._workers[worker.worker_id]
        if worker.keeper is not None:
            self._spawn(self._retire(worker, worker.keeper), name=f"retire-{worker.worker_id}")
        log.info("%s left", worker.worker_id)
        self._notify()

    def report(self, worker: Worker, report: registry_pb2.RegisterRequest) -> None:
        """Takes one report of load, links and cache."""
        worker.load = report.load
        worker.links = tuple(report.links)
        worker.num_routed_tokens = 0
        if report.is_snapshot:
            worker.cached_blocks.clear()
        worker.cached_blocks.difference_update(report.removed_blocks)
        worker.cached_blocks.update(report.stored_blocks)
        self._notify()

    def prefill_peers(self) -> tuple[registry_pb2.Peer, ...]:
        """The prefill workers that every decode worker should have a session to."""
        return tuple(
            registry_pb2.Peer(
                worker_id=worker.worker_id,
                incarnation=worker.announcement.identity.incarnation,
                address=worker.announcement.address,
            )
            for worker in self
            if not worker.is_decode
        )

    def snapshot(self) -> Snapshot:
        """What the router decides on. Decode workers without an open session are not in it."""
        return Snapshot(
            decode=[
                _decode_view(worker, session)
                for worker in self._workers.values()
                if (session := worker.session) is not None
            ],
            prefill=[_prefill_view(worker) for worker in self._workers.values() if not worker.is_decode],
        )

    def take(self, route: Route, *, num_prompt_tokens: int) -> DecodeSession:
        """Notes that `route`, made from a snapshot of this very moment, was chosen; returns its session."""
        self._num_choices += 1
        session = self._workers[route.decode_worker].session
        if session is None:
            raise LookupError(f"{route.decode_worker} has no session")
        # Whoever prefills has the prompt before it; the other half only the sequence.
        self._workers[route.prefill_worker or route.decode_worker].num_routed_tokens += num_prompt_tokens
        for worker_id in filter(None, route):
            self._workers[worker_id].last_chosen = self._num_choices
        return session

    def max_model_len(self) -> int | None:
        """The longest context any decode worker with a session serves; None when there is none."""
        return max((worker.session.max_model_len for worker in self if worker.session is not None), default=None)

    def max_requests(self) -> int | None:
        """The most choices any decode worker with a session holds at once; None when there is none."""
        return max((worker.session.max_requests for worker in self if worker.session is not None), default=None)

    async def wait_for_change(self) -> None:
        """Returns at the next join, leave, report, or opening or end of a session."""
        await self._change.wait()

    async def close(self) -> None:
        """Ends every session."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_session(self, worker: Worker) -> None:
        """Keeps a session to a decode worker open until cancelled."""

        def on_open(session: DecodeSession) -> None:
            worker.session = session
            log.info("session with %s is open", worker.worker_id)
            self._notify()

        while True:
            try:
                await run_session(
                    worker.announcement, gateway_id=self._gateway_id, heartbeat_s=self._heartbeat_s, on_open=on_open
                )
                log.info("%s closed the session", worker.worker_id)
            except StaffettaError as error:
                log.warning("no session with %s: %s", worker.worker_id, error.message)
            except Exception:
                # Whatever it is, a worker that stays registered without a session is of no use to anybody.
                log.exception("the session with %s ended unexpectedly", worker.worker_id)
            finally:
                worker.session = None
                self._notify()
            await asyncio.sleep(REOPEN_S)

    async def _retire(self, worker: Worker, keeper: "asyncio.Task[None]") -> None:
        if worker.session is not None:
            await worker.session.wait_idle()
        keeper.cancel()

    def _spawn(self, coroutine: Coroutine[None, None, None], *, name: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _decode_view(worker: Worker, session: DecodeSession) -> DecodeView:
    load = worker.load
    return DecodeView(
        worker_id=worker.worker_id,
        block_size=worker.block_size,
        num_pending_tokens=load.num_pending_tokens + worker.num_routed_tokens,
        num_sequences=max(load.num_running + load.num_waiting, session.num_choices),
        num_available_blocks=load.num_available_blocks,
        is_draining=load.is_draining,
        is_stalled=session.is_stalled,
        cached_blocks=worker.cached_blocks,
        numerics_digest=worker.announcement.identity.numerics_digest,
        last_chosen=worker.last_chosen,
        max_requests=session.max_requests,
        max_model_len=session.max_model_len,
        num_in_flight=session.num_choices,
        links=frozenset(link.prefill_worker for link in worker.links),
        prefills_locally=worker.announcement.prefills_locally,
    )


def _prefill_view(worker: Worker) -> WorkerView:
    load = worker.load
    return WorkerView(
        worker_id=worker.worker_id,
        block_size=worker.block_size,
        num_pending_tokens=load.num_pending_tokens + worker.num_routed_tokens,
        num_sequences=load.num_running + load.num_waiting,
        num_available_blocks=load.num_available_blocks,
        is_draining=load.is_draining,
        cached_blocks=worker.cached_blocks,
        numerics_digest=worker.announcement.identity.numerics_digest,
        last_chosen=worker.last_chosen,
    )
