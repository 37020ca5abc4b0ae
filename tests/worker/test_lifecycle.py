"""A worker's process from its first to its last exit code, and the operator's door while it lives."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from engine.engine import EngineCounts
from prefill_svc.main import PrefillService
from staffetta.config.schema import PrefillConfig
from staffetta.errors import InvalidRequestError
from staffetta.exits import ExitCode, PortError, UsageError
from staffetta.rpc import logging as rpc_logging
from staffetta.rpc.channel import open_channel
from staffetta.rpc.server import RpcServer
from staffetta.rpc.status import error_from_rpc
from staffetta.v1 import common_pb2, control_pb2, control_pb2_grpc
from tests.handoff.cluster import make_prompt
from tests.prefill_svc.test_servicer import Reader
from tests.rpc.in_loop import in_loop, until
from worker import control, lifecycle
from worker.control import ControlServicer
from worker.lifecycle import Service, Worker
from worker.rank import load_rank


class RunningProcess:
    """A prefill worker that runs in this process, signals included."""

    def __init__(self, **settings: Any) -> None:
        values: dict[str, Any] = {"threads": 1, "num_blocks": 32, "transports": ("loopback",), "worker_id": "prefill-0"}
        config = PrefillConfig(**values | settings)
        self.rank = load_rank(config, common_pb2.WORKER_ROLE_PREFILL)
        self.worker = Worker(self.rank, lambda worker: PrefillService(worker, config))
        self.running = asyncio.create_task(self.worker.run())

    async def address(self) -> str:
        await until(lambda: self.worker._registration is not None)
        assert self.worker._registration is not None
        return self.worker._registration._announcement.address

    @asynccontextmanager
    async def control(self) -> AsyncIterator[Any]:
        async with open_channel(await self.address()) as channel:
            yield control_pb2_grpc.ControlServiceStub(channel)


@in_loop
async def test_a_worker_ends_with_zero_after_a_drain() -> None:
    num_threads = threading.active_count()
    process = RunningProcess()
    async with process.control() as stub:
        info = await stub.GetInfo(control_pb2.GetInfoRequest())
        assert info.identity == process.rank.identity
        assert info.backend == process.worker.backend
        assert process.rank._pages is not None
        load = await stub.GetLoad(control_pb2.GetLoadRequest())
        assert (load.total_blocks, load.free_blocks, load.num_sessions, load.is_draining) == (32, 32, 0, False)
        reported = await process.worker.load()
        blocks = (reported.free_blocks, reported.cached_blocks, reported.quarantined_blocks, reported.held_blocks)
        assert (blocks, reported.num_available_blocks) == ((32, 0, 0, 0), 32)
        assert load.num_tasks > 0
        assert load.num_descriptors > 3
        os.kill(os.getpid(), signal.SIGTERM)
        assert await process.running == 0
    await until(lambda: threading.active_count() <= num_threads + 4)  # executor and gRPC threads of the loop stay
    assert not any(thread.name in ("engine", "checksum_0") for thread in threading.enumerate())


def test_what_was_loaded_is_kept_from_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen:
        def __init__(self, rank: object, make_service: object) -> None:
            """Nothing is served."""

        async def run(self) -> int:
            return gc.get_freeze_count()

    config = PrefillConfig(threads=1, num_blocks=2, transports=("loopback",))
    rank = load_rank(config, common_pb2.WORKER_ROLE_PREFILL)
    monkeypatch.setattr(lifecycle, "load_rank", lambda *_: rank)
    monkeypatch.setattr(lifecycle, "Worker", Frozen)
    monkeypatch.setattr(rpc_logging, "configure", lambda *_: None)
    try:
        assert gc.get_freeze_count() == 0
        num_frozen = lifecycle.run_worker(config, common_pb2.WORKER_ROLE_PREFILL, lambda _: unserved())
        assert num_frozen > 50_000
    finally:
        gc.unfreeze()
        rank.stop()


def unserved() -> Service:
    raise AssertionError("nothing is served")


@in_loop
async def test_a_drain_waits_for_requests_as_long_as_it_may() -> None:
    process = RunningProcess(drain_s=0.2)
    worker = process.worker
    async with open_channel(await process.address()) as channel:
        reader = Reader(channel)
        await reader.open(Serving(worker))  # type: ignore[arg-type]
        handoff_id = await reader.start(make_prompt(40))
        await reader.until(handoff_id, "last", "first_tokens")
        started = asyncio.get_running_loop().time()
        os.kill(os.getpid(), signal.SIGTERM)
        events = await reader.until(handoff_id, "failed")
        assert events[-1].failed.reason == "DRAINING"
        assert asyncio.get_running_loop().time() - started >= 0.2
        reader.call.cancel()
    assert await process.running == 0


class Serving:
    """A worker as the reader of `tests.prefill_svc` sees one."""

    def __init__(self, worker: Worker) -> None:
        self.host = worker


@in_loop
async def test_a_second_signal_ends_a_worker_at_once_with_one() -> None:
    process = RunningProcess(drain_s=600.0)
    async with open_channel(await process.address()) as channel:
        reader = Reader(channel)
        await reader.open(Serving(process.worker))  # type: ignore[arg-type]
        handoff_id = await reader.start(make_prompt(40))
        await reader.until(handoff_id, "last", "first_tokens")
        os.kill(os.getpid(), signal.SIGTERM)
        await until(process.worker.is_draining)
        os.kill(os.getpid(), signal.SIGINT)
        assert await process.running == 1


@in_loop
async def test_a_worker_whose_engine_failed_ends_with_one(caplog: pytest.LogCaptureFixture) -> None:
    process = RunningProcess()
    await process.address()

    def defect(_: object) -> None:
        raise ZeroDivisionError("a defect")

    process.rank.engine_thread.submit(defect)
    assert await process.running == 1
    assert "the engine thread failed" in caplog.text


@in_loop
async def test_a_taken_port_ends_a_worker_and_all_its_threads() -> None:
    server = RpcServer([])
    address = await server.start("127.0.0.1:0")
    process = RunningProcess(listen=address, transports=("tcp", "loopback"))
    with pytest.raises(PortError) as raised:
        await process.running
    assert raised.value.exit_code == ExitCode.PORT_OR_PEER
    assert raised.value.what == f"{address} is taken"
    assert raised.value.fix == "--listen 127.0.0.1:0"
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name == "engine" or name.startswith("kv-") for name in names), names
    await server.stop(grace_s=0)


@in_loop
async def test_a_worker_without_gateways_warns_that_it_registers_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    for gateways in ((), ("127.0.0.1:1",)):
        caplog.clear()
        process = RunningProcess(gateways=gateways)
        address = await process.address()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await process.running == 0
        warning = f"no gateways are set: only peers that are told {address} find this worker"
        assert (warning in caplog.messages) == (gateways == ())


@in_loop
async def test_a_worker_on_all_interfaces_must_say_what_peers_dial() -> None:
    process = RunningProcess(listen="0.0.0.0:0", gateways=("127.0.0.1:1",))
    with pytest.raises(UsageError) as raised:
        await process.running
    port = raised.value.what.split()[4].rstrip(",").removeprefix("0.0.0.0:")
    assert int(port) > 0
    assert (raised.value.name, raised.value.fix) == ("ADVERTISE_MISSING", f"--advertise $(hostname):{port}")


# Control, over a service that is all script


class Scripted:
    """What control asks of a worker; requests end when the test says so, or when they are cancelled."""

    def __init__(self, num_requests: int) -> None:
        self.identity = common_pb2.WorkerIdentity(worker_id="w")
        self.backend = "cpu (scripted)"
        self.requests = num_requests
        self.num_drains = 0
        self.num_cancels = 0

    async def counts(self) -> EngineCounts:
        return EngineCounts(
            total_blocks=10,
            free_blocks=1,
            held_blocks=2,
            cached_blocks=3,
            quarantined_blocks=4,
            num_running=5,
            num_waiting=6,
            num_held=7,
            num_pending_tokens=8,
            engine_steps=9,
            num_copied_blocks=12,
        )

    def num_requests(self) -> int:
        return self.requests

    def num_sessions(self) -> int:
        return 11

    def handoff_counts(self) -> list[control_pb2.HandoffCount]:
        return [control_pb2.HandoffCount(state="open", outcome="failed", count=12)]

    def is_draining(self) -> bool:
        return self.num_drains > 0

    async def begin_drain(self) -> None:
        self.num_drains += 1

    def cancel_all(self) -> int:
        self.num_cancels += 1
        num_cancelled, self.requests = self.requests, 0
        return num_cancelled


@asynccontextmanager
async def controlled(scripted: Scripted) -> AsyncIterator[Any]:
    server = RpcServer([])
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlServicer(scripted), server.grpc)
    async with open_channel(await server.start("127.0.0.1:0")) as channel:
        yield control_pb2_grpc.ControlServiceStub(channel)
    await server.stop(grace_s=0)


@in_loop
async def test_load_is_told_number_by_number_and_the_blocks_add_up() -> None:
    async with controlled(Scripted(0)) as stub:
        load = await stub.GetLoad(control_pb2.GetLoadRequest())
    assert load.free_blocks + load.held_blocks + load.cached_blocks + load.quarantined_blocks == load.total_blocks == 10
    assert (load.free_blocks, load.held_blocks, load.cached_blocks, load.quarantined_blocks) == (1, 2, 3, 4)
    assert (load.num_running, load.num_waiting, load.num_held, load.engine_steps, load.num_sessions) == (5, 6, 7, 9, 11)
    assert load.copied_blocks == 12
    assert [(count.state, count.outcome, count.count) for count in load.handoffs] == [("open", "failed", 12)]


@in_loop
async def test_a_drain_reports_every_change_and_then_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "DRAIN_POLL_S", 0.001)
    scripted = Scripted(3)
    async with controlled(scripted) as stub:
        told: list[tuple[int, int, bool]] = []
        async for progress in stub.Drain(control_pb2.DrainRequest(timeout_s=60.0)):
            told.append((progress.num_remaining, progress.num_cancelled, progress.is_done))
            scripted.requests = max(0, scripted.requests - 1)
    assert told == [(3, 0, False), (2, 0, False), (1, 0, False), (0, 0, True)]
    assert (scripted.num_drains, scripted.num_cancels) == (1, 0)


@in_loop
async def test_a_drain_without_time_cancels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "DRAIN_POLL_S", 0.001)
    scripted = Scripted(4)
    async with controlled(scripted) as stub:
        told = [progress async for progress in stub.Drain(control_pb2.DrainRequest())]
    assert (told[-1].num_remaining, told[-1].num_cancelled, told[-1].is_done) == (0, 4, True)
    assert scripted.num_cancels == 1


@in_loop
async def test_draining_an_idle_worker_is_over_at_once_and_may_be_repeated() -> None:
    async with controlled(Scripted(0)) as stub:
        for _ in range(2):
            told = [progress async for progress in stub.Drain(control_pb2.DrainRequest(timeout_s=5.0))]
            assert [(progress.num_remaining, progress.is_done) for progress in told] == [(0, True)]


@pytest.mark.parametrize("timeout_s", [-1.0, 3601.0, float("nan"), float("inf")])
def test_a_drain_of_no_sensible_length_is_refused(timeout_s: float) -> None:
    @in_loop
    async def run() -> None:
        scripted = Scripted(1)
        async with controlled(scripted) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in stub.Drain(control_pb2.DrainRequest(timeout_s=timeout_s)):
                    pass
        error = error_from_rpc(raised.value)
        assert isinstance(error, InvalidRequestError)
        assert error.message == f"timeout_s is {timeout_s:g}, must be 0 to 3600 seconds"
        assert scripted.num_drains == 0

    run()
