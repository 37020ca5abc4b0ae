"""A gateway in this process with fake workers, and a way to run async tests that also proves that no task is left."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

import grpc.aio
import httpx

from gateway.app import Gateway
from gateway.model import Model, load_model
from staffetta.config.schema import GatewayConfig
from staffetta.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.gateway.fakes import CLUSTER_KEY, HEARTBEAT_S, FakeDecodeWorker

P = ParamSpec("P")

CONFIG = GatewayConfig(
    http="127.0.0.1:0", grpc="127.0.0.1:0", heartbeat_s=HEARTBEAT_S, start_timeout_s=5.0, cluster_key=CLUSTER_KEY
)
TIMEOUT_S = 10.0


def asynchronous(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Runs an async test on its own loop, bounded in time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 2 * TIMEOUT_S))

    return run


@functools.cache
def demo_model() -> Model:
    """The embedded model, read once."""
    return load_model(CONFIG)


def ids_of(text: str) -> list[int]:
    """Token ids that decode to `text`."""
    return demo_model().text.encode(text)


def play(worker: FakeDecodeWorker, *texts: str) -> None:
    """What the choices answer, in order."""
    worker.replies = {choice: ids_of(text) for choice, text in enumerate(texts)}


def generate(channel: grpc.aio.Channel, text: str = "x", **sampling: Any) -> Any:
    """A call of Generate, with sampling parameters by name."""
    request = inference_pb2.GenerateRequest(text=text, sampling=common_pb2.SamplingParams(**sampling))
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits, yielding to the loop, until `condition` holds; the test's own bound ends a wait in vain."""
    while not condition():  # noqa: ASYNC110 - the conditions have no events of their own
        await asyncio.sleep(0.005)


@dataclass
class Running:
    """A gateway that serves, its first worker, and an HTTP client for it."""

    gateway: Gateway
    worker: FakeDecodeWorker
    http: httpx.AsyncClient
    http_address: str
    grpc_address: str
    others: list[FakeDecodeWorker]

    async def add_worker(
        self, worker_id: str, *, reply: Sequence[int] | None = (), max_model_len: int = 2048
    ) -> FakeDecodeWorker:
        """One more fake worker, with a session."""
        worker = FakeDecodeWorker(self.worker.digest, worker_id=worker_id, reply=reply)
        worker.max_model_len = max_model_len
        self.others.append(worker)
        await worker.start(self.grpc_address)
        await self.until_open(worker_id)
        return worker

    async def until_open(self, worker_id: str) -> None:
        """Waits for the session to a worker."""
        await eventually(lambda: any(w.worker_id == worker_id and w.session is not None for w in self.gateway.workers))

    def num_in_flight(self) -> int:
        """Requests in the gateway now, and on its sessions."""
        on_sessions = sum(w.session.num_in_flight for w in self.gateway.workers if w.session is not None)
        return sum(self.gateway.journeys.in_flight()) + on_sessions


@asynccontextmanager
async def running(
    *, reply: Sequence[int] | None = (), has_worker: bool = True, keep_alive_s: float = 15.0, **settings: Any
) -> AsyncIterator[Running]:
    """A gateway with one fake worker that plays `reply`; at the end everything is closed and no task is left."""
    before = asyncio.all_tasks()
    model = demo_model()
    gateway = Gateway(replace(CONFIG, **settings), model, keep_alive_s=keep_alive_s)
    ready = await gateway.start()
    worker = FakeDecodeWorker(model.digest, reply=reply)
    client = httpx.AsyncClient(base_url=f"http://{ready.http}", timeout=TIMEOUT_S)
    it = Running(gateway, worker, client, ready.http, ready.grpc, [])
    try:
        if has_worker:
            await worker.start(ready.grpc)
            await it.until_open(worker.worker_id)
        yield it
    finally:
        await client.aclose()
        for one in (worker, *it.others):
            await one.stop()
        await gateway.close()
    await eventually(lambda: not _left(before))


def _left(before: "set[asyncio.Task[Any]]") -> set[str]:
    """Names of tasks that this test started and that still run; gRPC's own pollers belong to the loop."""
    return {
        task.get_name()
        for task in asyncio.all_tasks() - before
        if not task.done() and "grpc" not in repr(task.get_coro())
    }
