"""What every process's server does: one owner of a port, health, reflection, and a frozen peer is noticed."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from staffetta.errors import QueueFullError, WorkerLostError
from staffetta.exits import ExitCode
from staffetta.rpc import probe
from staffetta.rpc.channel import open_channel
from staffetta.rpc.options import CHANNEL_OPTIONS, SERVER_OPTIONS
from staffetta.rpc.server import BindError, RpcServer
from staffetta.rpc.session import SILENT_HEARTBEATS, SessionPipe
from staffetta.rpc.status import abort, error_from_rpc, error_of_call
from staffetta.v1 import control_pb2, control_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tests.rpc.in_loop import in_loop

CONTROL = "staffetta.v1.ControlService"


class FailingServicer(control_pb2_grpc.ControlServiceServicer):
    """Refuses GetInfo with a typed error, breaks on GetLoad."""

    async def GetInfo(  # noqa: N802
        self, request: control_pb2.GetInfoRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> control_pb2.GetInfoResponse:
        await abort(context, QueueFullError("full: 3 of 3", param="prompt"))

    async def GetLoad(  # noqa: N802
        self, request: control_pb2.GetLoadRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> control_pb2.GetLoadResponse:
        await abort(context, ZeroDivisionError("/secret/path"))

    async def Drain(  # noqa: N802
        self, request: control_pb2.DrainRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[control_pb2.DrainResponse]:
        yield control_pb2.DrainResponse(is_done=True)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[RpcServer, str]]:
    server = RpcServer([CONTROL])
    control_pb2_grpc.add_ControlServiceServicer_to_server(FailingServicer(), server.grpc)
    address = await server.start("127.0.0.1:0")
    try:
        yield server, address
    finally:
        await server.stop(grace_s=0)


async def health(address: str, service: str = "") -> str:
    return await asyncio.to_thread(probe.probe, address, service=service)


@in_loop
async def test_health_follows_the_life_of_a_server() -> None:
    async with serving() as (server, address):
        assert [await health(address), await health(address, CONTROL)] == ["NOT_SERVING", "NOT_SERVING"]
        await server.set_serving()
        assert [await health(address), await health(address, CONTROL)] == ["SERVING", "SERVING"]
        await server.set_draining()
        assert [await health(address), await health(address, CONTROL)] == ["NOT_SERVING", "NOT_SERVING"]
        assert await health(address, "staffetta.v1.NoSuchService") == "NOT_FOUND"


@in_loop
async def test_a_health_watch_hears_of_the_drain() -> None:
    async with serving() as (server, address), open_channel(address) as channel:
        await server.set_serving()
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=CONTROL))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.set_draining()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


@in_loop
async def test_reflection_lists_the_services() -> None:
    async with serving() as (_, address), open_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, channel))
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
        names = [service.name for service in response.list_services_response.service]
        call.cancel()
    assert names == ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", CONTROL]


@in_loop
async def test_a_taken_port_is_an_error_and_not_a_second_listener() -> None:
    async with serving() as (_, address):
        with pytest.raises(BindError, match=f"cannot listen on {address}"):
            await RpcServer([CONTROL]).start(address)


@in_loop
async def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(BindError, match=r"cannot listen on 192\.0\.2\.1:50051"):
        await RpcServer([CONTROL]).start("192.0.2.1:50051")


def test_no_server_shares_its_port() -> None:
    assert dict(SERVER_OPTIONS)["grpc.so_reuseport"] == 0


def test_both_sides_have_all_three_options_of_keep_alive() -> None:
    for options in (dict(SERVER_OPTIONS), dict(CHANNEL_OPTIONS)):
        times = [
            options[f"grpc.{name}"] for name in ("keepalive_time_ms", "keepalive_timeout_ms", "http2.ping_timeout_ms")
        ]
        assert times == [1000, 1000, 1000]


@in_loop
async def test_a_typed_error_reaches_the_client_whole() -> None:
    async with serving() as (_, address), open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await control_pb2_grpc.ControlServiceStub(channel).GetInfo(control_pb2.GetInfoRequest())
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = error_from_rpc(raised.value)
        assert isinstance(error, QueueFullError)
        assert (error.message, error.param) == ("full: 3 of 3", "prompt")


@in_loop
async def test_an_untyped_error_reaches_the_client_without_its_text() -> None:
    async with serving() as (_, address), open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await control_pb2_grpc.ControlServiceStub(channel).GetLoad(control_pb2.GetLoadRequest())
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in f"{raised.value.details()}{raised.value.trailing_metadata()}"


def test_probe_ends_with_zero_exactly_for_serving(capsys: pytest.CaptureFixture[str]) -> None:
    codes: dict[str, int] = {}

    @in_loop
    async def run() -> None:
        async with serving() as (server, address):
            codes["starting"] = await asyncio.to_thread(probe.main, [address])
            await server.set_serving()
            codes["serving"] = await asyncio.to_thread(probe.main, [address])
        codes["gone"] = await asyncio.to_thread(probe.main, [address, "--timeout", "0.2"])

    run()
    assert codes == {"starting": ExitCode.PORT_OR_PEER, "serving": ExitCode.OK, "gone": ExitCode.PORT_OR_PEER}
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()][:2] == ["NOT_SERVING", "SERVING"]


@asynccontextmanager
async def child_server(heartbeat_s: float) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.rpc.silent_server", str(heartbeat_s), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        with suppress(ProcessLookupError):  # a test may have killed it
            process.kill()
        await process.wait()


class FrozenPeer:
    """A session to a child server that is stopped with SIGSTOP after its first message."""

    def __init__(self, address: str, *, heartbeat_s: float) -> None:
        self.channel = open_channel(address)
        self.call = prefill_pb2_grpc.PrefillServiceStub(self.channel).Session()
        self.pipe: SessionPipe[prefill_pb2.PrefillSessionResponse, prefill_pb2.PrefillSessionRequest] = SessionPipe(
            self.call.read, self.call.write, heartbeat_s=heartbeat_s
        )

    async def run(self, process: asyncio.subprocess.Process) -> None:
        """Returns never; raises how the session ended."""

        async def consume() -> None:
            assert await self.pipe.receive() is not None
            process.send_signal(signal.SIGSTOP)
            while await self.pipe.receive() is not None:
                pass

        await self.pipe.run(consume(), make_heartbeat=prefill_pb2.PrefillSessionRequest)


@in_loop
async def test_a_frozen_peer_is_noticed_by_the_silence_of_its_session() -> None:
    async with child_server(0.1) as (process, address):
        peer = FrozenPeer(address, heartbeat_s=0.2)
        started = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"silent for 0\.6 s"):
            await peer.run(process)
        assert time.monotonic() - started < 0.2 * SILENT_HEARTBEATS + 1.0
        await peer.channel.close()


@in_loop
async def test_a_frozen_peer_is_noticed_by_keep_alive_within_three_seconds() -> None:
    async with child_server(0.1) as (process, address):
        peer = FrozenPeer(address, heartbeat_s=60.0)  # silence alone would take three minutes
        started = time.monotonic()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
            await peer.run(process)
        assert time.monotonic() - started < 3.5
        error = await error_of_call(peer.call)
        assert error is not None
        assert (error.reason, error.is_retryable) == ("UNAVAILABLE", True)
        await peer.channel.close()


@in_loop
async def test_a_killed_peer_is_noticed_at_once() -> None:
    async with child_server(0.1) as (process, address):
        peer = FrozenPeer(address, heartbeat_s=60.0)
        assert await peer.pipe.receive() is not None
        process.kill()
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError):
            while True:
                await peer.pipe.receive()
        assert time.monotonic() - started < 1.0
        await peer.channel.close()
