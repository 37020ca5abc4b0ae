"""The parent's membership: passed on, change by change, to the children that relay requests.

What a child has been told, in order, makes its own membership equal to this one; so what a router decides from it is
the same function of the same facts in every child. Event loop only.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from gateway.membership import Membership, Worker
from gateway.workers import Workers
from staffetta.v1 import gateway_pb2, registry_pb2

BLOCKS_PER_MESSAGE: Final = 128 * 1024
"""A megabyte of hashes: a cache of any size fits in messages below the link's bound."""


class Roster(Membership):
    """All registered workers, as the parent knows them."""

    def __init__(
        self, *, tell: Callable[[gateway_pb2.ParentMessage], None], is_open_everywhere: Callable[[Worker], bool]
    ) -> None:
        """`tell` sends to every child; `is_open_everywhere` says whether every child has a session to a worker."""
        super().__init__()
        self._tell = tell
        self._is_open_everywhere = is_open_everywhere

    def join(self, announcement: registry_pb2.WorkerAnnouncement) -> Worker:
        """Registers a worker, and tells the children."""
        worker = super().join(announcement)
        self._tell(gateway_pb2.ParentMessage(joined=announcement))
        return worker

    def leave(self, worker: Worker) -> None:
        """Removes a worker, and tells the children. Idempotent."""
        if not worker.has_left:
            self._tell(gateway_pb2.ParentMessage(left=worker.worker_id))
        super().leave(worker)

    def report(self, worker: Worker, report: registry_pb2.RegisterRequest) -> None:
        """Takes one report, and passes it on."""
        super().report(worker, report)
        passed = registry_pb2.RegisterRequest()
        passed.CopyFrom(report)
        passed.ClearField("announcement")
        self._tell(_reported(worker, passed))

    def forget_cache(self, worker: Worker) -> None:
        """Forgets what a worker holds in cache, here and in the children, and asks for all of it."""
        super().forget_cache(worker)
        self._tell(_reported(worker, _known(worker)))

    def has_session(self, worker: Worker) -> bool:
        """Whether every child could send it a request."""
        return self._is_open_everywhere(worker)

    def so_far(self) -> Iterator[gateway_pb2.ParentMessage]:
        """What a child that has been told nothing must be told to know as much as this."""
        for worker in self:
            yield gateway_pb2.ParentMessage(joined=worker.announcement)
            blocks = iter(worker.cached_blocks)
            report = _known(worker)
            report.stored_blocks.extend(islice(blocks, BLOCKS_PER_MESSAGE))
            yield _reported(worker, report)
            while more := list(islice(blocks, BLOCKS_PER_MESSAGE)):
                yield _reported(
                    worker, registry_pb2.RegisterRequest(load=worker.load, links=worker.links, stored_blocks=more)
                )


def follow(workers: Workers, message: gateway_pb2.ParentMessage) -> None:
    """Does in a child's membership what the parent's has done. Of a worker that it never heard of: nothing."""
    match message.WhichOneof("message"):
        case "joined":
            workers.join(message.joined)
        case "reported":
            if (worker := workers.named(message.reported.worker_id)) is not None:
                workers.report(worker, message.reported.report)
        case "left":
            if (worker := workers.named(message.left)) is not None:
                workers.leave(worker)


def _known(worker: Worker) -> registry_pb2.RegisterRequest:
    """All that is known of a worker but the blocks in its cache."""
    return registry_pb2.RegisterRequest(load=worker.load, links=worker.links, is_snapshot=True)


def _reported(worker: Worker, report: registry_pb2.RegisterRequest) -> gateway_pb2.ParentMessage:
    return gateway_pb2.ParentMessage(reported=gateway_pb2.PassedReport(worker_id=worker.worker_id, report=report))
