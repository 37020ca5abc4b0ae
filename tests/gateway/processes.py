"""A gateway of several processes as one is started, and what a client and an operator see of it."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import psutil
from prometheus_client.parser import text_string_to_metric_families

from gateway.parent import Parent
from staffetta.config.schema import GatewayConfig
from staffetta.exits import OperatorError
from staffetta.rpc.channel import open_channel
from staffetta.v1 import registry_pb2, registry_pb2_grpc
from tests.gateway.fakes import CLUSTER_KEY, HEARTBEAT_S, FakeDecodeWorker
from tests.gateway.running import CONFIG, TIMEOUT_S, demo_model, eventually

NUM_CHILDREN = 2
READY = "model demo, REST on http://"
SEVERAL = replace(CONFIG, workers=NUM_CHILDREN, registry="127.0.0.1:0")


@dataclass
class Processes:
    """A parent that runs in a process of its own, and its children."""

    process: "subprocess.Popen[str]"
    http: str = ""
    grpc: str = ""
    registry: str = ""
    log: list[str] = field(default_factory=list)

    def children(self) -> list[psutil.Process]:
        """The children that live now."""
        return [
            child for child in psutil.Process(self.process.pid).children() if child.status() != psutil.STATUS_ZOMBIE
        ]

    async def scrape(self) -> dict[str, float]:
        """Metrics without labels, those with them under `name{value}`, by a connection of its own."""
        _, _, page = (await ask(self.http, "/metrics")).partition("\r\n\r\n")
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                labels = (f"{{{value}}}" for name, value in sample.labels.items() if name != "model_name")
                values[sample.name + "".join(labels)] = sample.value
        return values

    async def listed(self, address: str) -> dict[str, bool]:
        """Registered workers, as the registry at `address` lists them, and whether they have sessions."""
        async with open_channel(address) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            response = await stub.ListWorkers(registry_pb2.ListWorkersRequest(), timeout=TIMEOUT_S)
        return {worker.announcement.identity.worker_id: worker.has_session for worker in response.workers}

    async def until_open(self, *worker_ids: str) -> None:
        """Waits until every child has a session to each of exactly these workers."""
        while await self.listed(self.registry) != dict.fromkeys(worker_ids, True):  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.01)

    async def until_serving(self, num_children: int) -> None:
        """Waits until so many children serve."""
        while (await self.scrape())["staffetta_gateway_processes"] != num_children:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


def make_parent(config: GatewayConfig = SEVERAL, *, failures: list[OperatorError] | None = None) -> Parent:
    """A parent in this process, not started; what ends it is noted in `failures`."""
    return Parent(config, demo_model(), on_failure=([] if failures is None else failures).append)


def command(*flags: str) -> list[str]:
    """A gateway on free ports, with `flags` besides."""
    doors = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--registry", "127.0.0.1:0")
    common = (f"--cluster-key={CLUSTER_KEY}", f"--heartbeat-s={HEARTBEAT_S}", f"--workers={NUM_CHILDREN}")
    return [sys.executable, "-m", "gateway", *doors, *common, *flags]


@contextlib.contextmanager
def started(*flags: str) -> Iterator[Processes]:
    """A gateway with `flags`, all of whose children serve. Whoever lives at the end is killed."""
    with subprocess.Popen(command(*flags), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        it = Processes(process)
        try:
            for line in process.stderr:
                it.log.append(line)
                if READY in line:
                    words = line.replace(",", "").split()
                    it.http = words[words.index("REST") + 2].removeprefix("http://")
                    it.grpc, it.registry = words[words.index("gRPC") + 2], words[words.index("registry") + 2]
                    break
            assert it.http, it.log
            reader = threading.Thread(target=lambda: it.log.extend(process.stderr or ()))
            reader.start()
            try:
                yield it
            finally:
                for child in it.children() if process.poll() is None else []:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()
                reader.join()
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def fake_worker(
    it: Processes, worker_id: str = "decode-0", *, reply: Sequence[int] | None = ()
) -> AsyncIterator[FakeDecodeWorker]:
    """A worker that every child has a session to."""
    worker = FakeDecodeWorker(demo_model().digest, worker_id=worker_id, reply=reply)
    await worker.start(it.registry)
    try:
        await it.until_open(*{*(await it.listed(it.registry)), worker_id})
        yield worker
    finally:
        await worker.stop()
        while it.process.poll() is None and worker_id in await it.listed(it.registry):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


async def ask(address: str, path: str, body: str = "") -> str:
    """What one request over a connection of its own is answered, head and all. Raises ConnectionError when it breaks.

    Not with a client library, which needs milliseconds for each new connection: fake workers share this process.
    """
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        method = "POST" if body else "GET"
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        return (await reader.read()).decode()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def stream(it: Processes) -> str:
    """The text of one streamed completion. Raises ConnectionError when it breaks, or has no end."""
    answer = await ask(it.http, "/v1/completions", '{"prompt": "x", "stream": true, "max_tokens": 64}')
    if "data: [DONE]" not in answer:
        raise ConnectionError(answer[-300:])
    chunks = [json.loads(data) for data in re.findall(r"^data: ({.*)$", answer, re.MULTILINE)]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def until_started(worker: FakeDecodeWorker, num_requests: int) -> None:
    """Waits until the worker has been sent so many requests."""
    await eventually(lambda: worker.starts.qsize() >= num_requests)
