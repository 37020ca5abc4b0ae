"""Prefill and decode workers of one process, over real gRPC and real transports, with the embedded model; and a client.

Only the process's own life (signals, registration) is left out: a worker here is a rank, its service and a server.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc.aio

from decode_svc.main import DecodeService
from engine.engine import EngineCounts
from kvtransfer.loopback import LoopbackExporter, LoopbackFaults
from prefill_svc.main import PrefillService
from staffetta.config.schema import DecodeConfig, PrefillConfig
from staffetta.rpc.channel import open_channel
from staffetta.rpc.server import RpcServer
from staffetta.rpc.session import PROTOCOL_VERSION, SessionPipe, prompt_parts
from staffetta.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from tests.rpc.in_loop import until
from worker.lifecycle import Service, Worker
from worker.rank import Rank, load_rank

VOCAB_SIZE = 1000
CLUSTER_KEY = "ab" * 32

_Pipe = SessionPipe[decode_pb2.DecodeSessionResponse, decode_pb2.DecodeSessionRequest]


@dataclass(slots=True, eq=False)
class Host:
    """What a service asks of its worker."""

    rank: Rank
    failures: list[BaseException] = field(default_factory=list)

    def on_engine_failure(self, error: BaseException) -> None:
        self.failures.append(error)

    def report_now(self) -> None:
        """Nobody to tell."""


@dataclass(slots=True, eq=False)
class RunningWorker:
    """One worker that serves."""

    host: Host
    service: Service
    server: RpcServer
    address: str

    async def counts(self) -> EngineCounts:
        return await asyncio.wrap_future(self.host.rank.engine_thread.call(lambda engine: engine.counts()))

    async def check_integrity(self) -> None:
        await asyncio.wrap_future(self.host.rank.engine_thread.call(lambda engine: engine.check_integrity()))

    @property
    def faults(self) -> LoopbackFaults:
        """What goes wrong with reads from a prefill worker whose one transport is loopback."""
        (exporter,) = cast(PrefillService, self.service)._exporters
        return cast(LoopbackExporter, exporter).faults

    def handoffs(self) -> dict[tuple[str, str], int]:
        return {(count.state, count.outcome): count.count for count in self.service.handoff_counts()}


@asynccontextmanager
async def _serving(rank: Rank, make_service: Callable[[Worker], Service]) -> AsyncIterator[RunningWorker]:
    host = Host(rank)
    service = make_service(cast(Worker, host))
    server = RpcServer([])
    service.start()
    service.add_to(server)
    address = await server.start("127.0.0.1:0")
    try:
        yield RunningWorker(host, service, server, address)
    finally:
        await server.stop(grace_s=0.2)
        await service.close()
        await asyncio.to_thread(rank.stop)
    assert host.failures == []


@asynccontextmanager
async def prefill_worker(**settings: Any) -> AsyncIterator[RunningWorker]:
    """A prefill worker; `settings` are those of its configuration."""
    config = PrefillConfig(**_defaults("prefill-0") | settings)
    rank = await asyncio.to_thread(load_rank, config, common_pb2.WORKER_ROLE_PREFILL)
    async with _serving(rank, lambda worker: PrefillService(worker, config)) as running:
        yield running


@asynccontextmanager
async def decode_worker(*peers: RunningWorker, **settings: Any) -> AsyncIterator[RunningWorker]:
    """A decode worker that is paired with `peers`."""
    addresses = tuple(peer.address for peer in peers)
    config = DecodeConfig(**_defaults("decode-0") | {"prefill_peers": addresses} | settings)
    rank = await asyncio.to_thread(load_rank, config, common_pb2.WORKER_ROLE_DECODE)
    async with _serving(rank, lambda worker: DecodeService(worker, config)) as running:
        await until_linked(running, len(peers))
        yield running


async def until_linked(decode: RunningWorker, num_links: int) -> None:
    """Waits until the decode worker has exactly that many working sessions."""
    await until(lambda: len(decode.service.links()) == num_links)


async def until_counts(worker: RunningWorker, holds: Callable[[EngineCounts], bool]) -> None:
    """Waits until the engine's counts satisfy `holds`; the test's own limit bounds it."""
    while not holds(await worker.counts()):  # noqa: ASYNC110 (what is waited for has no event)
        await asyncio.sleep(0.005)


async def until_idle(*workers: RunningWorker) -> None:
    """Waits until no request and no block is held anywhere, then checks everybody's books."""
    for worker in workers:
        await until(lambda: worker.service.num_requests() == 0)  # noqa: B023 (called in this turn of the loop)
        await until_counts(worker, lambda counts: counts.held_blocks == counts.quarantined_blocks == 0)
        counts = await worker.counts()
        assert counts.free_blocks + counts.cached_blocks == counts.total_blocks
        assert (counts.num_running, counts.num_waiting, counts.num_held) == (0, 0, 0)
        await worker.check_integrity()


def _defaults(worker_id: str) -> dict[str, Any]:
    return {
        "worker_id": worker_id,
        "threads": 1,
        "cluster_key": CLUSTER_KEY,
        "num_blocks": 64,
        "transports": ("loopback",),
        "heartbeat_s": 0.5,
    } | ({"local_prefill": "never"} if worker_id.startswith("decode") else {})


def make_prompt(num_tokens: int, *, seed: int = 0) -> list[int]:
    """Token ids that differ from the first on for different seeds."""
    return [(seed * 131 + position * 7 + position * position % 89) % VOCAB_SIZE for position in range(num_tokens)]


def make_sampling(**fields: Any) -> common_pb2.SamplingParams:
    """Greedy, without an early end, unless `fields` say otherwise."""
    values: dict[str, Any] = {"temperature": 0, "top_p": 1, "top_k": 0, "seed": 1, "max_tokens": 6, "ignore_eos": True}
    return common_pb2.SamplingParams(**values | fields)


@dataclass(slots=True, eq=False)
class Answer:
    """One request's events so far."""

    request_id: str
    choices: tuple[int, ...] = (0,)
    tokens_of: dict[int, list[common_pb2.Token]] = field(init=False)
    """Each choice's tokens."""
    endings: dict[int, decode_pb2.SequenceEvent] = field(default_factory=dict)
    """The last event of each choice that has ended."""
    prompt_tokens: list[common_pb2.Token] = field(default_factory=list)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.tokens_of = {choice_index: [] for choice_index in self.choices}

    @property
    def tokens(self) -> list[common_pb2.Token]:
        """Those of the first choice."""
        return self.tokens_of[self.choices[0]]

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def all_token_ids(self) -> list[list[int]]:
        """Choice by choice."""
        return [[token.token_id for token in tokens] for tokens in self.tokens_of.values()]

    @property
    def last(self) -> decode_pb2.SequenceEvent | None:
        """The event after which nothing comes, as far as it has come."""
        return list(self.endings.values())[-1] if len(self.endings) == len(self.choices) else None

    @property
    def finish_reasons(self) -> list[common_pb2.FinishReason.ValueType]:
        return [self.endings[choice_index].finish_reason for choice_index in self.choices]

    @property
    def handoff(self) -> common_pb2.HandoffReport:
        assert self.last is not None
        return self.last.summary.handoff

    @property
    def failure(self) -> common_pb2.Failure:
        assert self.last is not None
        return self.last.failure

    async def until(self, holds: Callable[["Answer"], bool]) -> "Answer":
        while not holds(self):
            self.has_news.clear()
            await self.has_news.wait()
        return self

    async def ended(self) -> "Answer":
        return await self.until(lambda answer: answer.last is not None)

    def take(self, event: decode_pb2.SequenceEvent) -> None:
        """Adds an event.

        Each choice's tokens come without a gap and not twice, and nothing comes after its ending; the prompt's come
        before them.
        """
        assert event.choice_index not in self.endings, f"an event after the ending: {event}"
        if event.prompt_tokens:
            assert not any(self.tokens_of.values()), "the prompt is scored before the first token is drawn"
            self.prompt_tokens.extend(event.prompt_tokens)
            positions = [token.index for token in self.prompt_tokens]
            assert positions == list(range(1, len(positions) + 1))
        tokens = self.tokens_of[event.choice_index]
        tokens.extend(event.tokens)
        first = tokens[0].index if tokens else 0
        assert [token.index for token in tokens] == list(range(first, first + len(tokens)))
        if event.finish_reason:
            self.endings[event.choice_index] = event
        self.has_news.set()


class Client:
    """One gateway's session with a decode worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        call = decode_pb2_grpc.DecodeServiceStub(channel).Session()
        self.call = call
        self.pipe: _Pipe = SessionPipe(call.read, call.write, heartbeat_s=0.5)
        self.answers: dict[str, Answer] = {}

    def send(self, **command: Any) -> None:
        self.pipe.send(decode_pb2.DecodeSessionRequest(**command))

    def start(self, prompt: Sequence[int], *, max_tokens: int = 6, **fields: Any) -> Answer:
        """Starts a greedy request that does not end early; `fields` are those of StartRequest."""
        sampling = fields.pop("sampling", make_sampling(max_tokens=max_tokens))
        is_restart = fields.get("first_token_index", 0) > 0
        choices = (fields.get("choice_index", 0),) if is_restart else tuple(range(sampling.n or 1))
        answer = Answer(fields.pop("request_id", secrets.token_hex(16)), choices)
        self.answers[answer.request_id] = answer
        first, *rest = prompt_parts(prompt)
        values: dict[str, Any] = {"token_ids": first, "num_prompt_tokens": len(prompt), "credit": 1000}
        values["sampling"] = sampling
        start = decode_pb2.StartRequest(request_id=answer.request_id, **values | fields)
        self.send(start=start)
        for part in rest:
            self.send(append_prompt=decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=part))
        return answer

    def cancel(self, answer: Answer) -> None:
        self.send(cancel=decode_pb2.CancelRequest(request_id=answer.request_id))

    async def ask(self, prompt: Sequence[int], **options: Any) -> Answer:
        """Starts a request and waits for its end."""
        return await self.start(prompt, **options).ended()

    async def consume(self, opened: "asyncio.Future[decode_pb2.DecodeSessionOpened]") -> None:
        while (message := await self.pipe.receive()) is not None:
            match message.WhichOneof("message"):
                case "opened":
                    opened.set_result(message.opened)
                case "step":
                    for event in message.step.events:
                        self.answers[event.request_id].take(event)


def _make_heartbeat() -> decode_pb2.DecodeSessionRequest:
    return decode_pb2.DecodeSessionRequest(heartbeat=common_pb2.Heartbeat())


@asynccontextmanager
async def client_of(decode: RunningWorker) -> AsyncIterator[Client]:
    """A client with an open session."""
    async with open_channel(decode.address) as channel:
        client = Client(channel)
        client.send(
            open=decode_pb2.OpenDecodeSession(
                protocol_version=PROTOCOL_VERSION,
                heartbeat_s=1.0,
                gateway_id="gateway",
                model_digest=decode.host.rank.identity.model_digest,
            )
        )
        opened: asyncio.Future[decode_pb2.DecodeSessionOpened] = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(client.pipe.run(client.consume(opened), make_heartbeat=_make_heartbeat))
        waiting: set[Awaitable[Any]] = {running, opened}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        try:
            if running.done():
                await running
            yield client
        finally:
            client.call.cancel()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def copy_model(directory: Path) -> Path:
    """The embedded model under another digest: the same weights, one byte of metadata more."""
    import demo

    directory.mkdir()
    for path in demo.MODEL_DIR.iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    config = directory / "config.json"
    config.write_text(config.read_text() + "\n")
    return directory
