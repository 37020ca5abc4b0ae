"""Stand-ins for gateway and workers that start in milliseconds, for the promises of the command and its supervisor.

A worker does what its failpoints say: `exit:on:N` ends with code N at once, `ignore-term:on:1` outlives SIGTERM.
The gateway lists the workers that serve and answers every prompt with `the answer`; a prompt that says `slow` makes it
ignore SIGTERM, as one that never finishes its requests would.
"""

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from staffetta.config.schema import DecodeConfig, GatewayConfig, PrefillConfig
from staffetta.rpc.server import RpcServer
from staffetta.v1 import common_pb2, inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc


def worker_main(config: PrefillConfig | DecodeConfig) -> int:
    """Serves nothing until SIGTERM."""
    for failpoint in config.failpoints:
        if failpoint.startswith("exit:on:"):
            print("error[FAKE]: as told", file=sys.stderr)
            return int(failpoint.removeprefix("exit:on:"))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("serving", config.worker_id, file=sys.stderr, flush=True)
    (Path(config.shm_dir) / config.worker_id).touch()
    while True:
        signal.sigwait({signal.SIGTERM})
        print("told to end", file=sys.stderr, flush=True)
        if "ignore-term:on:1" not in config.failpoints:
            return 0


def gateway_main(config: GatewayConfig) -> int:
    """Serves until SIGTERM."""
    return asyncio.run(_serve_gateway(config))


async def _serve_gateway(config: GatewayConfig) -> int:
    stop = asyncio.Event()
    servicer = FakeInference()  # type: ignore[abstract]  # the other calls are not made
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None if servicer.is_stuck else stop.set())
    registry = FakeRegistry()  # type: ignore[abstract]  # as above
    server = RpcServer(())
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server.grpc)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc)
    await server.start(config.grpc)
    await server.set_serving()
    await stop.wait()
    await server.stop(grace_s=0.0)
    print("drained", file=sys.stderr, flush=True)
    return 0


class FakeRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """Lists the workers that have left a file with their name in the private directory."""

    async def ListWorkers(  # noqa: N802 (the wire's name)
        self, request: registry_pb2.ListWorkersRequest, context: Any
    ) -> registry_pb2.ListWorkersResponse:
        return registry_pb2.ListWorkersResponse(workers=[make_worker(name) for name in find_serving()])


def find_serving() -> list[str]:
    """The names that workers have left in the private directory."""
    return sorted(path.name for path in Path(tempfile.gettempdir()).glob("staffetta-*/*-[0-9]"))


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers in two pieces."""

    def __init__(self) -> None:
        self.is_stuck = False

    async def Generate(  # noqa: N802 (the wire's name)
        self, request: inference_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if request.chat.messages and "slow" in request.chat.messages[-1].content:
            self.is_stuck = True
            yield make_delta("still")
            await asyncio.Event().wait()
        yield make_delta("the ")
        yield make_delta("answer")
        yield inference_pb2.GenerateResponse(finished=make_finished())


def make_delta(text: str) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(delta=inference_pb2.GenerateDelta(text=text))


def make_finished() -> inference_pb2.GenerateFinished:
    return inference_pb2.GenerateFinished(
        finish_reason=common_pb2.FINISH_REASON_STOP,
        usage=common_pb2.Usage(prompt_tokens=70, completion_tokens=2),
        handoff=common_pb2.HandoffReport(
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            transport="shm",
            handoff_bytes=1_258_291,
            handoff_blocks=5,
        ),
    )


def make_worker(
    name: str, *, links: tuple[str, ...] = ("prefill-0",), has_session: bool = True
) -> registry_pb2.RegisteredWorker:
    """A registered worker; `links` and the session are a decode worker's only."""
    is_decode = name.startswith("decode")
    identity = common_pb2.WorkerIdentity(
        worker_id=name,
        role=common_pb2.WORKER_ROLE_DECODE if is_decode else common_pb2.WORKER_ROLE_PREFILL,
        model="demo",
        layout=common_pb2.KVLayout(groups=[common_pb2.KVGroup(block_size=16)]),
    )
    announcement = registry_pb2.WorkerAnnouncement(
        identity=identity, num_blocks=512, pool_bytes=24 * 2**20, num_parameters=3_100_000, backend="cpu (reference)"
    )
    if not is_decode:
        return registry_pb2.RegisteredWorker(announcement=announcement)
    return registry_pb2.RegisteredWorker(
        announcement=announcement,
        links=[registry_pb2.PeerLink(prefill_worker=peer, transport="shm", bytes_per_s=6.1e9) for peer in links],
        has_session=has_session,
    )
