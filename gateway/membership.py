"""Who is registered: workers, their reports, what they hold in cache. What the registry's streams say and nothing else.

Never dials anybody: `gateway.workers` adds the sessions of a process that relays requests, `gateway.roster` passes the
membership on to such processes. Event loop only.
"""

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from staffetta.v1 import common_pb2, registry_pb2

if TYPE_CHECKING:
    from gateway.session import DecodeSession

log = logging.getLogger(__name__)


class Worker:
    """One registered worker, changed by its `Membership` alone."""

    def __init__(self, announcement: registry_pb2.WorkerAnnouncement) -> None:
        self.announcement: Final = announcement
        self.worker_id: Final = announcement.identity.worker_id
        self.load = registry_pb2.WorkerLoad()
        self.links: tuple[registry_pb2.PeerLink, ...] = ()
        self.cached_blocks: set[int] = set()
        self.session: DecodeSession | None = None
        """This process's own; always None where it keeps no sessions."""
        self.keeper: asyncio.Task[None] | None = None
        self.has_left = False
        self.wants_snapshot = False
        self.last_chosen = 0
        self.num_routed_tokens = 0
        """Prompt tokens routed here by this process since the last report, which cannot know of them yet."""

    @property
    def is_decode(self) -> bool:
        """Whether it generates tokens."""
        return self.announcement.identity.role == common_pb2.WORKER_ROLE_DECODE

    @property
    def block_size(self) -> int:
        """Token positions in one of its KV blocks."""
        return self.announcement.identity.layout.groups[0].block_size


class Membership:
    """All registered workers."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._change = asyncio.Event()

    def __iter__(self) -> Iterator[Worker]:
        return iter(sorted(self._workers.values(), key=lambda worker: worker.worker_id))

    def named(self, worker_id: str) -> Worker | None:
        """The worker that has the name now."""
        return self._workers.get(worker_id)

    def join(self, announcement: registry_pb2.WorkerAnnouncement) -> Worker:
        """Registers a worker. Another of the same name has left by that: a restart is told apart by its incarnation."""
        worker = Worker(announcement)
        if (former := self._workers.get(worker.worker_id)) is not None:
            self.leave(former)
        self._workers[worker.worker_id] = worker
        log.info("%s joined: %s", worker.worker_id, announcement.backend)
        self._notify()
        return worker

    def leave(self, worker: Worker) -> None:
        """Removes a worker from routing. Idempotent, also after another has taken its name."""
        if worker.has_left:
            return
        worker.has_left = True
        del self._workers[worker.worker_id]
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

    def forget_cache(self, worker: Worker) -> None:
        """A report was lost, and it may have told of a removal: nothing of the index can be believed. Asks for all."""
        worker.cached_blocks.clear()
        worker.wants_snapshot = True

    def has_session(self, worker: Worker) -> bool:
        """Whether a request could be sent to a decode worker."""
        return worker.session is not None

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

    def listed(self) -> registry_pb2.ListWorkersResponse:
        """The workers, in the order of their names, for who asks."""
        return registry_pb2.ListWorkersResponse(
            workers=[
                registry_pb2.RegisteredWorker(
                    announcement=worker.announcement,
                    load=worker.load,
                    links=worker.links,
                    has_session=self.has_session(worker),
                )
                for worker in self
            ]
        )

    async def wait_for_change(self) -> None:
        """Returns at the next join, leave, report, or opening or end of a session."""
        await self._change.wait()

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
