"""What a gateway is told of a worker, by a registry whose answers the test writes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc.aio
import pytest

from engine.cache.prefix import CacheEvents
from staffetta.errors import IncompatiblePeerError, InternalError
from staffetta.rpc.server import RpcServer
from staffetta.rpc.status import abort
from staffetta.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from tests.rpc.in_loop import in_loop, until
from worker import registration
from worker.registration import Registration, _Stream

ANNOUNCEMENT = registry_pb2.WorkerAnnouncement(
    identity=common_pb2.WorkerIdentity(worker_id="decode-0", incarnation="i"), address="127.0.0.1:1"
)
PEER = registry_pb2.Peer(worker_id="prefill-0", incarnation="x", address="127.0.0.1:2")


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Keeps every report by stream; answers with what is put into `answers`; `None` there ends the stream in order."""

    def __init__(self) -> None:
        self.streams: list[list[registry_pb2.RegisterRequest]] = []
        self.answers: asyncio.Queue[registry_pb2.RegisterResponse | Exception | None] = asyncio.Queue()

    async def Register(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        reports: list[registry_pb2.RegisterRequest] = []
        self.streams.append(reports)

        async def read() -> None:
            while (message := await context.read()) is not grpc.aio.EOF:
                reports.append(message)

        reading = asyncio.create_task(read())
        try:
            while (answer := await self.answers.get()) is not None:
                if isinstance(answer, Exception):
                    await abort(context, answer)
                await context.write(answer)
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading

    async def ListWorkers(  # noqa: N802
        self, request: registry_pb2.ListWorkersRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> registry_pb2.ListWorkersResponse:
        return registry_pb2.ListWorkersResponse()


class Reporter:
    """A worker that tells what the test sets."""

    def __init__(self) -> None:
        self.is_draining = False
        self.snapshot: tuple[int, ...] = ()
        self.events: list[CacheEvents] = []
        self.failure: Exception | None = None
        self.num_loads = 0

    async def load(self) -> registry_pb2.WorkerLoad:
        self.num_loads += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return registry_pb2.WorkerLoad(num_running=3, is_draining=self.is_draining)

    async def cache_events(self) -> CacheEvents:
        return self.events.pop(0) if self.events else CacheEvents((), ())

    async def cache_snapshot(self) -> CacheEvents:
        return CacheEvents(self.snapshot, ())

    def links(self) -> Sequence[registry_pb2.PeerLink]:
        return [registry_pb2.PeerLink(prefill_worker="prefill-0", transport="shm", bytes_per_s=1e9)]


class Registered:
    """A registry, a worker that registers with it, and what the worker heard."""

    def __init__(self, address: str, server: RpcServer, registry: Registry) -> None:
        self.address = address
        self.server = server
        self.registry = registry
        self.reporter = Reporter()
        self.heard: list[tuple[str, tuple[registry_pb2.Peer, ...]]] = []
        self.registration = Registration(
            [address],
            ANNOUNCEMENT,
            self.reporter,
            on_peers=lambda gateway, peers: self.heard.append((gateway, tuple(peers))),
        )

    @property
    def reports(self) -> list[registry_pb2.RegisterRequest]:
        """Reports of the newest stream."""
        return self.registry.streams[-1] if self.registry.streams else []

    async def until_reports(self, number: int, *, num_streams: int = 1) -> None:
        await until(lambda: len(self.registry.streams) >= num_streams and len(self.reports) >= number)


async def serve(registry: Registry, listen: str = "127.0.0.1:0") -> tuple[RpcServer, str]:
    server = RpcServer([])
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server.grpc)
    return server, await server.start(listen)


@asynccontextmanager
async def registered(
    *, events: Sequence[CacheEvents] = (), snapshot: tuple[int, ...] = ()
) -> AsyncIterator[Registered]:
    registry = Registry()
    server, address = await serve(registry)
    made = Registered(address, server, registry)
    made.reporter.snapshot = snapshot
    task = asyncio.create_task(made.registration.run())
    try:
        yield made
        assert not task.done(), "the registration ended"
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await made.server.stop(grace_s=0)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "REPORT_INTERVAL_S", 0.01)
    monkeypatch.setattr(registration, "REDIAL_S", 0.01)


@in_loop
async def test_a_stream_begins_with_the_announcement_and_a_snapshot() -> None:
    async with registered(snapshot=(11, 12)) as worker:
        await worker.until_reports(3)
        first, second, third = worker.reports[:3]
        assert first.announcement == ANNOUNCEMENT
        assert (first.is_snapshot, list(first.stored_blocks), list(first.removed_blocks)) == (True, [11, 12], [])
        assert not second.HasField("announcement")
        assert (second.is_snapshot, list(second.stored_blocks)) == (False, [])
        assert [report.sequence_number for report in (first, second, third)] == [1, 2, 3]
        assert [report.load.num_running for report in (first, second, third)] == [3, 3, 3]
        assert [link.prefill_worker for link in third.links] == ["prefill-0"]


@in_loop
async def test_what_changes_in_the_cache_is_told_once() -> None:
    async with registered(snapshot=(1,)) as worker:
        await worker.until_reports(1)
        worker.reporter.events.extend([CacheEvents((2, 3), (1,)), CacheEvents((4,), ())])
        await until(lambda: any(4 in report.stored_blocks for report in worker.reports))
        await worker.until_reports(len(worker.reports) + 2)
        stored = [block for report in worker.reports[1:] for block in report.stored_blocks]
        removed = [block for report in worker.reports[1:] for block in report.removed_blocks]
        assert (sorted(stored), removed) == ([2, 3, 4], [1])
        assert not any(report.is_snapshot for report in worker.reports[1:])


def test_changes_that_wait_are_netted_to_the_last_word() -> None:
    stream = _Stream()
    for events in (CacheEvents((1, 2), ()), CacheEvents((), (1,)), CacheEvents((3,), (2,)), CacheEvents((2,), ())):
        stream.changes.update(dict.fromkeys(events.removed, False))
        stream.changes.update(dict.fromkeys(events.stored, True))
    assert stream.take_changes() == [(1, False), (2, True), (3, True)]
    assert stream.take_changes() == []


@in_loop
async def test_what_is_above_the_bound_of_a_report_comes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "MAX_EVENTS_PER_REPORT", 2)
    async with registered(snapshot=(1, 2, 3, 4, 5)) as worker:
        await worker.until_reports(3)
        told = [(report.is_snapshot, list(report.stored_blocks)) for report in worker.reports[:3]]
        assert told == [(True, [1, 2]), (False, [3, 4]), (False, [5])]


@in_loop
async def test_a_gateway_that_missed_something_gets_a_snapshot() -> None:
    async with registered(snapshot=(1,)) as worker:
        await worker.until_reports(2)
        worker.reporter.snapshot = (1, 7)
        worker.registry.answers.put_nowait(registry_pb2.RegisterResponse(wants_snapshot=True))
        await until(lambda: sum(report.is_snapshot for report in worker.reports) == 2)
        second = [report for report in worker.reports if report.is_snapshot][1]
        assert list(second.stored_blocks) == [1, 7]


@in_loop
async def test_news_are_reported_without_waiting_for_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "REPORT_INTERVAL_S", 600.0)
    async with registered() as worker:
        await worker.until_reports(1)
        worker.reporter.is_draining = True
        worker.registration.report_now()
        await worker.until_reports(2)
        assert [report.load.is_draining for report in worker.reports] == [False, True]


def test_news_while_a_report_is_written_are_in_the_next_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "REPORT_INTERVAL_S", 600.0)

    @in_loop
    async def run() -> None:
        worker = Registered("127.0.0.1:1", RpcServer([]), Registry())
        stream = _Stream()
        written: list[registry_pb2.RegisterRequest] = []

        async def write(report: registry_pb2.RegisterRequest) -> None:
            written.append(report)
            if len(written) == 1:  # in the middle of it, something changes
                worker.reporter.is_draining = True
                stream.report_now.set()

        reporting = asyncio.create_task(worker.registration._report(write, stream))
        await until(lambda: len(written) == 2)
        reporting.cancel()
        assert [report.load.is_draining for report in written] == [False, True]

    run()


@in_loop
async def test_the_peers_that_a_gateway_names_are_passed_on_and_forgotten_with_it() -> None:
    async with registered() as worker:
        worker.registry.answers.put_nowait(registry_pb2.RegisterResponse(prefill_peers=[PEER]))
        await until(lambda: len(worker.heard) == 1)
        worker.registry.answers.put_nowait(None)
        await until(lambda: len(worker.heard) == 2)
        assert worker.heard == [(worker.address, (PEER,)), (worker.address, ())]


@in_loop
async def test_a_stream_that_the_gateway_closes_is_opened_again_with_a_snapshot() -> None:
    async with registered(snapshot=(5,)) as worker:
        for num_streams in range(1, 6):
            await worker.until_reports(1, num_streams=num_streams)
            assert worker.reports[0].announcement == ANNOUNCEMENT
            assert (worker.reports[0].sequence_number, worker.reports[0].is_snapshot) == (1, True)
            worker.registry.answers.put_nowait(None)


@in_loop
async def test_a_report_that_meets_a_closed_stream_ends_no_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "REPORT_INTERVAL_S", 0.0)  # always in the middle of a report
    async with registered() as worker:
        for num_streams in range(1, 12):
            await worker.until_reports(1, num_streams=num_streams)
            worker.registry.answers.put_nowait(None)


@in_loop
async def test_a_worker_registers_again_when_the_gateway_is_back() -> None:
    async with registered() as worker:
        await worker.until_reports(1)
        await worker.server.stop(grace_s=0)
        await until(lambda: worker.heard == [(worker.address, ())])
        worker.server, _ = await serve(worker.registry, worker.address)
        await worker.until_reports(1, num_streams=2)
        assert worker.reports[0].announcement == ANNOUNCEMENT


@in_loop
async def test_a_refusal_is_told_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async with registered() as worker:
        for _ in range(3):
            worker.registry.answers.put_nowait(IncompatiblePeerError("model_digest is a here and b there"))
        await worker.until_reports(1, num_streams=4)
    told = [record for record in caplog.records if "model_digest is a here and b there" in record.getMessage()]
    assert len(told) == 1


@in_loop
async def test_a_report_that_cannot_be_made_costs_one_stream() -> None:
    async with registered() as worker:
        await worker.until_reports(1)
        worker.reporter.failure = InternalError("no counts")
        await worker.until_reports(1, num_streams=2)


@in_loop
async def test_every_gateway_is_told_the_same() -> None:
    first, second = Registry(), Registry()
    servers = [await serve(registry) for registry in (first, second)]
    reporter = Reporter()
    reporter.snapshot = (1,)
    made = Registration([address for _, address in servers], ANNOUNCEMENT, reporter, on_peers=lambda *_: None)
    task = asyncio.create_task(made.run())
    await until(lambda: all(registry.streams and registry.streams[0] for registry in (first, second)))
    reporter.events.append(CacheEvents((8,), ()))
    for registry in (first, second):
        await until(lambda: any(8 in report.stored_blocks for report in registry.streams[0][1:]))  # noqa: B023
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    for server, _ in servers:
        await server.stop(grace_s=0)
