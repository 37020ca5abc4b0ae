"""The registered workers and this process's sessions to those that decode.

A worker that left takes no new requests; its session goes on until the requests on it have ended or it breaks by
itself. Event loop only.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Final

from gateway.membership import Membership, Worker
from gateway.router import DecodeView, Route, Snapshot, WorkerView
from gateway.session import DecodeSession, run_session
from staffetta.errors import StaffettaError
from staffetta.v1 import registry_pb2

REOPEN_S: Final = 0.2

log = logging.getLogger(__name__)


class Workers(Membership):
    """All registered workers, and one task for each decode worker that keeps a session to it open."""

    def __init__(self, *, gateway_id: str, heartbeat_s: float) -> None:
        super().__init__()
        self._gateway_id = gateway_id
        self._heartbeat_s = heartbeat_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_choices = 0

    def join(self, announcement: registry_pb2.WorkerAnnouncement) -> Worker:
        """Registers a worker, and opens a session to one that decodes."""
        worker = super().join(announcement)
        if worker.is_decode:
            worker.keeper = self._spawn(self._keep_session(worker), name=f"session-{worker.worker_id}")
        return worker

    def leave(self, worker: Worker) -> None:
        """Removes a worker from routing; its session ends with its last request. Idempotent."""
        if worker.keeper is not None and not worker.has_left:
            self._spawn(self._retire(worker, worker.keeper), name=f"retire-{worker.worker_id}")
        super().leave(worker)

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
