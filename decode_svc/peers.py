"""Keeps a working session to every prefill worker that a gateway names: dial, compare, pick a transport, watch.

A session that ends fails its hand-offs at once and is dialled again for as long as the worker is wanted. Event loop
only; `views` is replaced as a whole, so that the engine thread can read it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc.aio

from decode_svc.decision import PeerView
from decode_svc.handoff import Handoff
from kvtransfer.memory import PoolMemory
from kvtransfer.transport import BlockRead, KVReader, SelfTest, TransportOffer, choose, open_reader
from staffetta.errors import IncompatiblePeerError, ProtocolError, StaffettaError, TransportError, WorkerLostError
from staffetta.rpc.channel import open_channel
from staffetta.rpc.session import PROTOCOL_VERSION, SessionPipe, prompt_parts
from staffetta.rpc.status import error_from_failure, error_of_call
from staffetta.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc, registry_pb2
from worker.codec import offer_from_proto
from worker.pairing import check_pair

log = logging.getLogger(__name__)

REDIAL_S = 0.2
REFUSED_REDIAL_S = 5.0

_Pipe = SessionPipe[prefill_pb2.PrefillSessionResponse, prefill_pb2.PrefillSessionRequest]


@dataclass(slots=True, eq=False)
class PeerSession:
    """A working session to one prefill worker. Satisfies `handoff.Peer`."""

    worker_id: str
    pipe: _Pipe
    reader: KVReader
    self_test: SelfTest
    handoffs: dict[str, Handoff] = field(default_factory=dict)
    _engine_turns: int = -1
    _progress_at: float = field(default_factory=time.monotonic)
    _read_at: float = field(default_factory=time.monotonic)

    @property
    def transport(self) -> str:
        """The transport in use."""
        return self.reader.transport

    def last_progress(self) -> float:
        """Monotonic time at which the peer's engine last advanced or said something."""
        return self._progress_at

    def read(self, ticket: bytes, reads: list[BlockRead]) -> "Future[int]":
        """Starts reading blocks."""
        read = self.reader.read(ticket, reads)
        read.add_done_callback(lambda _: self._note_read())
        return read

    def last_read(self) -> float:
        """Monotonic time at which a read of this session last ended: reads queue, and a long queue is no standstill."""
        return self._read_at

    def _note_read(self) -> None:
        """On a thread of the transport."""
        self._read_at = time.monotonic()

    def cut(self) -> None:
        """Ends the endpoint, and the session with it: useless without a transport, it is dialled again for both.

        `KVReader.close` waits for its threads, so it runs on one of its own.
        """
        asyncio.get_running_loop().run_in_executor(None, self.reader.close)
        self.pipe.fail(TransportError(f"the {self.transport} transport of {self.worker_id} was stuck and has been cut"))

    def start(self, handoff: Handoff, start: prefill_pb2.StartPrefill) -> None:
        """Sends a prompt to be computed, in as many messages as it takes."""
        self.handoffs[handoff.handoff_id] = handoff
        first, *rest = prompt_parts(handoff.request.prompt_token_ids)
        start.token_ids.extend(first)
        self.pipe.send(prefill_pb2.PrefillSessionRequest(start=start))
        for part in rest:
            append = prefill_pb2.AppendPrefillPrompt(handoff_id=handoff.handoff_id, token_ids=part)
            self.pipe.send(prefill_pb2.PrefillSessionRequest(append_prompt=append))

    def release(self, handoff_id: str) -> None:
        """Frees the peer's blocks; idempotent."""
        if self.handoffs.pop(handoff_id, None) is not None:
            release = prefill_pb2.ReleasePrefill(handoff_id=handoff_id)
            self.pipe.send(prefill_pb2.PrefillSessionRequest(release=release))

    def on_events(self, events: Iterable[prefill_pb2.PrefillEvent]) -> None:
        """Passes the peer's news on. Events of hand-offs that ended meanwhile are late and dropped."""
        self._progress_at = time.monotonic()
        for event in events:
            handoff = self.handoffs.get(event.handoff_id)
            if handoff is None:
                continue
            match event.WhichOneof("event"):
                case "chunk_ready":
                    handoff.on_chunk(event.chunk_ready)
                case "prompt_logprobs":
                    handoff.on_prompt_logprobs(event.prompt_logprobs)
                case "first_tokens":
                    handoff.on_first_tokens(event.first_tokens)
                case "failed":
                    handoff.stop(error_from_failure(event.failed))

    def on_heartbeat(self, heartbeat: common_pb2.Heartbeat) -> None:
        """Notes whether the peer's engine advances."""
        if heartbeat.engine_turns != self._engine_turns:
            self._engine_turns = heartbeat.engine_turns
            self._progress_at = time.monotonic()

    def lose(self, error: StaffettaError) -> None:
        """Fails every hand-off: the session is over."""
        for handoff in tuple(self.handoffs.values()):
            handoff.stop(error)


class Peers:
    """All prefill workers this decode worker knows. `views` may be read by any thread."""

    def __init__(
        self,
        identity: common_pb2.WorkerIdentity,
        memory: PoolMemory,
        *,
        transports: Sequence[str],
        static_addresses: Sequence[str],
        heartbeat_s: float,
        engine_turns: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when a session has begun or ended; `engine_turns` feeds heartbeats."""
        self._identity = identity
        self._memory = memory
        self._transports = frozenset(transports)
        self._heartbeat_s = heartbeat_s
        self._engine_turns = engine_turns
        self._on_change = on_change
        self._wanted: dict[str, frozenset[str]] = {"": frozenset(static_addresses)}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sessions: dict[str, PeerSession] = {}
        self.views: tuple[PeerView, ...] = ()
        self._dial_wanted()

    def set_wanted(self, source: str, peers: Sequence[registry_pb2.Peer]) -> None:
        """Replaces the prefill workers that `source` (a gateway) names."""
        self._wanted[source] = frozenset(peer.address for peer in peers)
        self._dial_wanted()

    def session(self, worker_id: str) -> PeerSession | None:
        """The working session to that prefill worker, if there is one."""
        return self._sessions.get(worker_id)

    def links(self) -> list[registry_pb2.PeerLink]:
        """What gateways are told of working sessions."""
        return [
            registry_pb2.PeerLink(
                prefill_worker=session.worker_id,
                transport=session.transport,
                bytes_per_s=session.self_test.bytes_per_s,
            )
            for session in self._sessions.values()
        ]

    def refresh_views(self) -> None:
        """Publishes how many hand-offs each session runs."""
        self.views = tuple(PeerView(s.worker_id, len(s.handoffs)) for s in self._sessions.values())

    async def close(self) -> None:
        """Ends every session."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _dial_wanted(self) -> None:
        for address in self._all_wanted() - self._tasks.keys():
            self._tasks[address] = asyncio.create_task(self._keep(address), name=f"prefill-{address}")

    def _all_wanted(self) -> frozenset[str]:
        return frozenset().union(*self._wanted.values())

    async def _keep(self, address: str) -> None:
        """Serves sessions to `address` while it is wanted. One that works lives on: its peer's end is what ends it."""
        told = ""  # the last ending in the log: a worker that is away for hours ends in one line
        while address in self._all_wanted():
            channel = open_channel(address)
            pause_s = REDIAL_S
            try:
                await self._run_session(channel)
            except IncompatiblePeerError as error:
                log.error("prefill worker at %s cannot be paired: %s", address, error.message)
                pause_s = REFUSED_REDIAL_S
            except StaffettaError as error:
                if error.message != told:
                    log.info("session with the prefill worker at %s ended: %s", address, error.message)
                told = error.message
            except Exception:
                # A defect, here or there, costs this session and not the peer for ever.
                log.exception("session with the prefill worker at %s ended unexpectedly", address)
                pause_s = REFUSED_REDIAL_S
            finally:
                await channel.close()
            await asyncio.sleep(pause_s)
        del self._tasks[address]

    async def _run_session(self, channel: grpc.aio.Channel) -> None:
        """Opens a session and serves it to its end, which is always a StaffettaError."""
        call = prefill_pb2_grpc.PrefillServiceStub(channel).Session()
        pipe: _Pipe = SessionPipe(call.read, call.write, heartbeat_s=self._heartbeat_s)
        opening = prefill_pb2.OpenPrefillSession(
            protocol_version=PROTOCOL_VERSION, identity=self._identity, heartbeat_s=self._heartbeat_s
        )
        pipe.send(prefill_pb2.PrefillSessionRequest(open=opening))
        try:
            await pipe.run(self._serve(pipe), make_heartbeat=self._heartbeat)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write that meets a finished call says so in general terms; the call's status has the reason.
            raise await error_of_call(call) or _closed() from None
        finally:
            call.cancel()
        raise await error_of_call(call) or _closed()

    async def _serve(self, pipe: _Pipe) -> None:
        first = await pipe.receive()
        if first is None:
            return
        if first.WhichOneof("message") != "opened":
            raise ProtocolError("the prefill worker's first message does not open the session")
        check_pair(self._identity, first.opened.identity)
        pipe.expect_heartbeats(first.opened.heartbeat_s)
        offers = [offer_from_proto(offer) for offer in first.opened.transports]
        reader, self_test = await self._open(offers)
        session = PeerSession(first.opened.identity.worker_id, pipe, reader, self_test)
        self._sessions[session.worker_id] = session
        self._changed()
        log.info("paired with %s over %s, %.1f GB/s", session.worker_id, session.transport, self_test.bytes_per_s / 1e9)
        try:
            await self._receive(session)
        finally:
            if self._sessions.get(session.worker_id) is session:
                del self._sessions[session.worker_id]
            self._changed()
            session.lose(WorkerLostError(f"the session with {session.worker_id} ended"))
            await asyncio.to_thread(reader.close)

    async def _receive(self, session: PeerSession) -> None:
        while (message := await session.pipe.receive()) is not None:
            match message.WhichOneof("message"):
                case "events":
                    session.on_events(message.events.events)
                case "heartbeat":
                    session.on_heartbeat(message.heartbeat)
                case other:
                    raise ProtocolError(f"message {other} has no place in an open session")

    async def _open(self, offers: Sequence[TransportOffer]) -> tuple[KVReader, SelfTest]:
        """Opens the fastest transport. Cancelled while it does, it leaves no reader open."""
        opening = asyncio.get_running_loop().run_in_executor(None, self._open_fastest, offers)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unused)
            raise

    def _open_fastest(self, offers: Sequence[TransportOffer]) -> tuple[KVReader, SelfTest]:
        """Tries every transport both sides have, measures each, keeps the fastest. Worker thread."""
        readers: dict[str, tuple[KVReader, SelfTest]] = {}
        for offer in offers:
            if offer.transport not in self._transports:
                continue
            try:
                reader = open_reader(offer, memory=self._memory)
            except StaffettaError as error:
                log.warning("transport %s cannot be used: %s", offer.transport, error.message)
                continue
            try:
                readers[offer.transport] = reader, reader.measure()
            except StaffettaError as error:
                log.warning("transport %s failed its self-test: %s", offer.transport, error.message)
                reader.close()
        if not readers:
            offered = ", ".join(offer.transport for offer in offers) or "none"
            raise IncompatiblePeerError(
                f"transports is {offered} at the peer and {', '.join(sorted(self._transports))} here; none works"
            )
        best = choose([self_test for _, self_test in readers.values()])
        for transport, (reader, _) in readers.items():
            if transport != best.transport:
                reader.close()
        return readers[best.transport]

    def _heartbeat(self) -> prefill_pb2.PrefillSessionRequest:
        return prefill_pb2.PrefillSessionRequest(heartbeat=common_pb2.Heartbeat(engine_turns=self._engine_turns()))

    def _changed(self) -> None:
        self.refresh_views()
        self._on_change()


def _closed() -> WorkerLostError:
    return WorkerLostError("the prefill worker closed the session")


def _close_unused(opening: "asyncio.Future[tuple[KVReader, SelfTest]]") -> None:
    """Closes the reader of a session that ended while it was being opened; it has no reads to wait for."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()
