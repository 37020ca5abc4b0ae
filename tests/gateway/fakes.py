"""A decode worker without an engine: a real server and a real registration, whose tokens the test decides."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from staffetta.hashing import key_fingerprint
from staffetta.rpc.channel import open_channel
from staffetta.rpc.server import RpcServer
from staffetta.rpc.session import SessionPipe
from staffetta.v1 import common_pb2, decode_pb2, decode_pb2_grpc, registry_pb2, registry_pb2_grpc

HEARTBEAT_S = 0.25
BLOCK_SIZE = 16
CLUSTER_KEY = "00" * 16

Pipe = SessionPipe[decode_pb2.DecodeSessionRequest, decode_pb2.DecodeSessionResponse]

SUMMARY = decode_pb2.SequenceSummary(
    cached_tokens=2,
    handoff=common_pb2.HandoffReport(
        prefill_worker="prefill-0", decode_worker="decode-0", transport="shm", handoff_bytes=4096, handoff_blocks=1
    ),
    num_preemptions=1,
    recomputed_tokens=6,
    timings=common_pb2.PhaseTimings(queue_s=0.0001, prefill_s=0.0002, transfer_s=0.0003, decode_s=0.0004),
)


def make_token(index: int, token_id: int, *, num_logprobs: int | None = None) -> common_pb2.Token:
    """A token with log-probability −0.5 and, when asked for, alternatives that follow it in the vocabulary."""
    token = common_pb2.Token(index=index, token_id=token_id)
    if num_logprobs is not None:
        token.logprob = -0.5
        for rank in range(num_logprobs):
            token.top_logprobs.add(token_id=token_id + rank, logprob=-0.5 - rank)
    return token


class FakeDecodeWorker(decode_pb2_grpc.DecodeServiceServicer):
    """Plays `reply` to every choice of every request, as far as its credit reaches; with `reply` None the test emits by
    hand. `replies` are those of choices that differ; tokens of the choices come by turns."""

    def __init__(self, digest: str, *, worker_id: str = "decode-0", reply: Sequence[int] | None = ()) -> None:
        self.digest = digest
        self.engine_turns: Iterator[int] = itertools.count()
        self.worker_id = worker_id
        self.incarnation = "1"
        self.reply = reply
        self.replies: dict[int, Sequence[int]] = {}
        self.numerics_digest = "numerics"
        self.finish_reason = common_pb2.FINISH_REASON_STOP
        self.failure: common_pb2.Failure | None = None
        self.max_requests = 64
        self.max_model_len = 2048
        self.links: list[registry_pb2.PeerLink] = []
        self.is_draining = False
        self.starts: asyncio.Queue[decode_pb2.StartRequest] = asyncio.Queue()
        self.cancels: asyncio.Queue[str] = asyncio.Queue()
        """Whole requests that were cancelled."""
        self.cancelled_choices: asyncio.Queue[int] = asyncio.Queue()
        self.obeys_cancels = True
        self.prompts: dict[str, list[int]] = {}
        self.credit: dict[tuple[str, int], int] = {}
        self.peers: list[str] = []
        self.num_wanted_snapshots = 0
        self.gateway_heartbeat_s = 0.0
        self.sequence_numbers: list[int] | None = None
        self._granted = asyncio.Event()
        self._pipe: Pipe | None = None
        """The newest session's."""
        self._pipes: dict[str, Pipe] = {}
        """Those that started a request."""
        self._rpc = RpcServer(["staffetta.v1.DecodeService"])
        self._tasks: list[asyncio.Task[None]] = []
        self._report = asyncio.Event()

    @property
    def identity(self) -> common_pb2.WorkerIdentity:
        return common_pb2.WorkerIdentity(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=common_pb2.WORKER_ROLE_DECODE,
            model="demo",
            model_digest=self.digest,
            numerics_digest=self.numerics_digest,
            layout=common_pb2.KVLayout(layout_id="layout", groups=[common_pb2.KVGroup(block_size=BLOCK_SIZE)]),
            key_fingerprint=key_fingerprint(bytes.fromhex(CLUSTER_KEY)),
        )

    async def start(self, registry: str) -> None:
        """Serves, and registers with the gateway at `registry`."""
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, self._rpc.grpc)
        self.address = await self._rpc.start("127.0.0.1:0")
        self._tasks.append(asyncio.create_task(self._register(registry)))

    async def stop(self) -> None:
        """Goes away, as a killed process does."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._rpc.stop(grace_s=0)

    def emit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        at: int = 0,
        choice: int = 0,
        finish: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED,
        num_logprobs: int | None = None,
    ) -> None:
        """Sends tokens, the first with index `at`, in one step."""
        event = decode_pb2.SequenceEvent(request_id=request_id, choice_index=choice, finish_reason=finish)
        event.tokens.extend(
            make_token(at + rank, token_id, num_logprobs=num_logprobs) for rank, token_id in enumerate(token_ids)
        )
        if finish:
            event.summary.CopyFrom(SUMMARY)
            event.summary.handoff.decode_worker = self.worker_id
        self.send(event)

    def score(self, request_id: str, positions: range, *, num_logprobs: int = 0) -> None:
        """Sends the log-probabilities of prompt tokens."""
        event = decode_pb2.SequenceEvent(request_id=request_id)
        prompt = self.prompts[request_id]
        event.prompt_tokens.extend(make_token(at, prompt[at], num_logprobs=num_logprobs) for at in positions)
        self.send(event)

    def requests_by_session(self) -> list[list[str]]:
        """The requests that each session started, which has any, in order."""
        by_pipe: dict[int, list[str]] = {}
        for request_id, pipe in self._pipes.items():
            by_pipe.setdefault(id(pipe), []).append(request_id)
        return list(by_pipe.values())

    def send(self, event: decode_pb2.SequenceEvent) -> None:
        self.send_step([event])

    def send_step(self, events: Sequence[decode_pb2.SequenceEvent]) -> None:
        """Sends events of requests of one session in one message."""
        pipe = self._pipes.get(events[0].request_id, self._pipe)
        assert pipe is not None
        pipe.send(decode_pb2.DecodeSessionResponse(step=decode_pb2.StepEvents(events=events)))

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        pipe = Pipe(context.read, context.write, heartbeat_s=HEARTBEAT_S)
        players: set[asyncio.Task[None]] = set()
        try:
            await pipe.run(
                self._serve(pipe, players),
                make_heartbeat=self._heartbeat,
            )
        finally:
            for player in players:
                player.cancel()

    def _heartbeat(self) -> decode_pb2.DecodeSessionResponse:
        heartbeat = common_pb2.Heartbeat(engine_turns=next(self.engine_turns))
        return decode_pb2.DecodeSessionResponse(heartbeat=heartbeat)

    async def _serve(self, pipe: Pipe, players: "set[asyncio.Task[None]]") -> None:
        first = await pipe.receive()
        assert first is not None
        assert first.open.model_digest == self.digest
        self.gateway_heartbeat_s = first.open.heartbeat_s
        opened = decode_pb2.DecodeSessionOpened(
            session_id="s",
            identity=self.identity,
            max_model_len=self.max_model_len,
            max_requests=self.max_requests,
            heartbeat_s=HEARTBEAT_S,
        )
        pipe.send(decode_pb2.DecodeSessionResponse(opened=opened))
        self._pipe = pipe
        while (message := await pipe.receive()) is not None:
            match message.WhichOneof("command"):
                case "start":
                    start = message.start
                    self._pipes[start.request_id] = pipe
                    self.prompts[start.request_id] = list(start.token_ids)
                    for choice in range(start.sampling.n):
                        self.credit[start.request_id, choice] = start.credit
                    self.starts.put_nowait(start)
                    if self.reply is not None:
                        players.add(asyncio.create_task(self._play(start)))
                case "append_prompt":
                    self.prompts[message.append_prompt.request_id].extend(message.append_prompt.token_ids)
                case "grant":
                    key = (message.grant.request_id, message.grant.choice_index)
                    if key in self.credit:
                        self.credit[key] += message.grant.tokens
                    self._granted.set()
                case "cancel":
                    self._cancel(message.cancel)

    def _cancel(self, cancel: decode_pb2.CancelRequest) -> None:
        is_whole = not cancel.HasField("choice_index")
        if is_whole:
            self.cancels.put_nowait(cancel.request_id)
        else:
            self.cancelled_choices.put_nowait(cancel.choice_index)
        for request_id, choice in tuple(self.credit):
            is_meant = request_id == cancel.request_id and (is_whole or choice == cancel.choice_index)
            if is_meant and self.obeys_cancels:
                del self.credit[request_id, choice]
                self.emit(request_id, (), choice=choice, finish=common_pb2.FINISH_REASON_CANCELLED)

    async def _play(self, start: decode_pb2.StartRequest) -> None:
        request_id = start.request_id
        if self.failure is not None:
            event = decode_pb2.SequenceEvent(
                request_id=request_id, finish_reason=common_pb2.FINISH_REASON_ERROR, failure=self.failure
            )
            self.send(event)
            return
        if start.sampling.HasField("prompt_logprobs"):
            self.score(request_id, range(1, start.num_prompt_tokens), num_logprobs=start.sampling.prompt_logprobs)
        num_logprobs = start.sampling.logprobs if start.sampling.HasField("logprobs") else None
        replies = {choice: self.replies.get(choice, self.reply or ()) for choice in range(start.sampling.n)}
        num_sent = dict.fromkeys(replies, 0)
        while num_sent:
            has_advanced = False
            for choice, index in tuple(num_sent.items()):
                if (request_id, choice) not in self.credit:
                    del num_sent[choice]
                    has_advanced = True
                    continue
                if index == min(len(replies[choice]), start.sampling.max_tokens):
                    del num_sent[choice], self.credit[request_id, choice]
                    is_cut = index < len(replies[choice])
                    reason = common_pb2.FINISH_REASON_LENGTH if is_cut else self.finish_reason
                    self.emit(request_id, (), choice=choice, finish=reason)
                elif index < self.credit[request_id, choice]:
                    token_id = replies[choice][index]
                    self.emit(request_id, [token_id], at=index, choice=choice, num_logprobs=num_logprobs)
                    num_sent[choice] += 1
                else:
                    continue
                has_advanced = True
            if not has_advanced:
                self._granted.clear()
                await self._granted.wait()

    async def _register(self, registry: str) -> None:
        channel = open_channel(registry)
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        reader = asyncio.create_task(self._read_answers(call))
        try:
            number = 0
            while True:
                number += 1
                report = registry_pb2.RegisterRequest(sequence_number=number, links=self.links)
                report.load.num_available_blocks = 100
                report.load.free_blocks = 70
                report.load.cached_blocks = 30
                report.load.quarantined_blocks = 4
                report.load.held_blocks = 24
                report.load.is_draining = self.is_draining
                if number == 1:
                    report.announcement.CopyFrom(
                        registry_pb2.WorkerAnnouncement(
                            identity=self.identity,
                            address=self.address,
                            num_blocks=128,
                            max_model_len=self.max_model_len,
                            prefills_locally=True,
                            num_parameters=1234,
                            backend="fake",
                        )
                    )
                await call.write(report)
                await asyncio.sleep(HEARTBEAT_S / 2)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            call.cancel()
            await channel.close()

    async def _read_answers(self, call: Any) -> None:
        async for answer in call:
            self.peers = [peer.worker_id for peer in answer.prefill_peers]
            self.num_wanted_snapshots += answer.wants_snapshot
