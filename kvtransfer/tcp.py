"""The tcp transport: our own framing (kvtransfer.frames) over blocking sockets in threads, for workers anywhere.

The sender serves each frame out of the pool, after checking the ticket for every block of it. The reader keeps two
connections, each with a thread, and receives straight into its own pool. Neither side allocates by what the other says.
Bytes and keys travel in the clear: run it inside a network that the workers' operator trusts.

A peer that stops never errors. Both sides therefore end by cutting the sockets, which makes any blocked call return.
"""

import socket
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from kvtransfer.connection import receive_exactly, receive_into, receive_within, send_views, shut
from kvtransfer.frames import (
    HELLO_BYTES,
    MAX_FRAME_UNITS,
    REPLY_HEAD_BYTES,
    REQUEST_HEAD_BYTES,
    RUN_BYTES,
    WELCOME_BYTES,
    FrameError,
    PoolShape,
    Region,
    Run,
    WelcomeStatus,
    encode_hello,
    encode_reply,
    encode_request,
    encode_welcome,
    parse_hello,
    parse_reply,
    parse_request_head,
    parse_runs,
    to_runs,
    to_views,
)
from kvtransfer.lanes import Lanes, failed_read
from kvtransfer.listener import Listener
from kvtransfer.memory import NUM_PROBE_UNITS, PROBE_BYTES, PROBE_UNIT_BYTES, PoolMemory
from kvtransfer.selftest import run_selftest
from kvtransfer.sessions import Sessions, check_welcome
from kvtransfer.ticket import TICKET_BYTES, TicketBook, TicketVerdict
from kvtransfer.transport import BlockRead, SelfTest, TransportOffer, check_reads
from staffetta.address import parse_address
from staffetta.errors import TransportError
from staffetta.failpoint import hit

NUM_CONNECTIONS: Final = 2
FRAME_BYTES: Final = 1024 * 1024  # large enough to hide a round trip, small enough to share a read among connections
HANDSHAKE_TIMEOUT_S: Final = 3.0
SELFTEST_TIMEOUT_S: Final = 10.0
LISTEN_BACKLOG: Final = 64


class TcpExporter:
    """Serves a pool to readers with a session key and tickets."""

    def __init__(self, memory: PoolMemory, *, tickets: TicketBook, listen: str, advertise: str) -> None:
        self.transport = "tcp"
        self._memory = memory
        self._tickets = tickets
        self._sessions = Sessions()
        address = parse_address(listen)
        listening = socket.create_server(address, family=address.family, backlog=LISTEN_BACKLOG)
        try:
            self._endpoint = _endpoint(listening.getsockname()[1], listen=listen, advertise=advertise)
        except ValueError:
            listening.close()
            raise
        self._listener = Listener(listening, self._serve, name="kv-tcp")

    def offer(self) -> TransportOffer:
        """As KVExporter says."""
        return TransportOffer(self.transport, self._endpoint, self._sessions.begin(), self._memory.num_blocks)

    def withdraw(self, session_key: bytes) -> None:
        """As KVExporter says."""
        self._sessions.end(session_key)

    def close(self) -> None:
        """As KVExporter says."""
        self._listener.close()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        session_key = parse_hello(receive_within(connection, HELLO_BYTES, timeout_s=HANDSHAKE_TIMEOUT_S))
        connection.settimeout(None)
        status = self._sessions.join(session_key, connection)
        try:
            shape = PoolShape(self._memory.num_blocks, self._memory.page_bytes, PROBE_BYTES)
            connection.sendall(encode_welcome(status, shape))
            while status is WelcomeStatus.ACCEPTED:
                self._serve_frame(connection, session_key)
        finally:
            self._sessions.leave(session_key, connection)

    def _serve_frame(self, connection: socket.socket, session_key: bytes) -> None:
        head = parse_request_head(receive_exactly(connection, REQUEST_HEAD_BYTES))
        body = receive_exactly(connection, head.num_runs * RUN_BYTES)
        if head.region is Region.PROBE:
            runs = parse_runs(body, num_runs=head.num_runs, num_units=NUM_PROBE_UNITS)
            views = to_views(self._memory.probe, runs, unit_bytes=PROBE_UNIT_BYTES)
            verdict = TicketVerdict.VALID
        else:
            runs = parse_runs(body, num_runs=head.num_runs, num_units=self._memory.num_blocks)
            views = to_views(self._memory.buffer, runs, unit_bytes=self._memory.page_bytes)
            block_ids = (run.first + offset for run in runs for offset in range(run.num_units))
            verdict = self._tickets.check(head.ticket, session_key, block_ids)
        if verdict is not TicketVerdict.VALID:
            connection.sendall(encode_reply(verdict, 0))
            return
        connection.sendall(encode_reply(verdict, sum(len(view) for view in views)))
        if head.region is Region.BLOCKS:
            hit("tcp.serving")
        send_views(connection, views)


@dataclass(frozen=True, slots=True)
class _Frame:
    """One request and where its answer goes: `views` are ours, in the order of `runs`, which are the peer's."""

    region: Region
    ticket: bytes
    runs: list[Run]
    views: list[memoryview]
    num_bytes: int


class _TcpLane:
    """One connection of a reader."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def move(self, part: _Frame) -> None:
        self._connection.sendall(encode_request(part.region, part.ticket, part.runs))
        reply = receive_exactly(self._connection, REPLY_HEAD_BYTES)
        verdict = parse_reply(reply, expected_bytes=part.num_bytes)
        if verdict is not TicketVerdict.VALID:
            raise TransportError(f"the peer refused to have blocks read: ticket {verdict.name}")
        for view in part.views:
            receive_into(self._connection, view)

    def cut(self) -> None:
        shut(self._connection)

    def close(self) -> None:
        self._connection.close()


class TcpReader:
    """Reads a peer's pool through NUM_CONNECTIONS connections."""

    def __init__(self, offer: TransportOffer, memory: PoolMemory) -> None:
        self.transport = "tcp"
        self._memory = memory
        self._num_remote_blocks = offer.num_blocks
        connections: list[socket.socket] = []
        try:
            for _ in range(NUM_CONNECTIONS):
                connections.append(_connect(offer, memory))  # noqa: PERF401 - those already open are closed on failure
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        self._lanes = Lanes([_TcpLane(connection) for connection in connections], name="kv-tcp-read")

    def read(self, ticket: bytes, reads: Sequence[BlockRead]) -> "Future[int]":
        """As KVReader says."""
        try:
            check_reads(reads, num_remote_blocks=self._num_remote_blocks, num_local_blocks=self._memory.num_blocks)
            if len(ticket) != TICKET_BYTES:
                raise TransportError(f"the peer's ticket has {len(ticket)} bytes, needs {TICKET_BYTES}")
        except TransportError as error:
            return failed_read(error)
        frames = plan_frames(
            Region.BLOCKS, ticket, reads, memory=self._memory.buffer, unit_bytes=self._memory.page_bytes
        )
        return self._lanes.submit(frames)

    def measure(self) -> SelfTest:
        """As KVReader says."""
        return run_selftest(self.transport, self._read_probe, expected=self._memory.probe)

    def close(self) -> None:
        """As KVReader says."""
        self._lanes.close()

    def _read_probe(self, buffer: memoryview) -> None:
        reads = [BlockRead(unit, unit) for unit in range(NUM_PROBE_UNITS)]
        frames = plan_frames(Region.PROBE, bytes(TICKET_BYTES), reads, memory=buffer, unit_bytes=PROBE_UNIT_BYTES)
        try:
            self._lanes.submit(frames).result(SELFTEST_TIMEOUT_S)
        except TimeoutError:
            self.close()
            raise TransportError(f"the peer did not answer the tcp self-test in {SELFTEST_TIMEOUT_S:.0f} s") from None


def plan_frames(
    region: Region, ticket: bytes, reads: Sequence[BlockRead], *, memory: memoryview, unit_bytes: int
) -> list[_Frame]:
    """Cuts a read into frames of about FRAME_BYTES and joins adjacent units, on each side for itself."""
    frame_units = max(1, min(MAX_FRAME_UNITS, FRAME_BYTES // unit_bytes))
    frames: list[_Frame] = []
    for start in range(0, len(reads), frame_units):
        part = reads[start : start + frame_units]
        runs = to_runs(read.remote_block_id for read in part)
        views = to_views(memory, to_runs(read.local_block_id for read in part), unit_bytes=unit_bytes)
        frames.append(_Frame(region, ticket, runs, views, len(part) * unit_bytes))
    return frames


def _endpoint(bound_port: int, *, listen: str, advertise: str) -> str:
    """What peers dial: `advertise`, or where we listen; port 0 stands for the port that was bound."""
    address = parse_address(advertise or listen)
    if address.host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        raise ValueError(f"peers cannot dial {address.host}: set transfer_advertise to a host:port that they can")
    return str(address._replace(port=address.port if advertise and address.port else bound_port))


def _connect(offer: TransportOffer, memory: PoolMemory) -> socket.socket:
    """Opens one connection and shakes hands; what comes back blocks without a timeout."""
    try:
        connection = socket.create_connection(parse_address(offer.endpoint), timeout=HANDSHAKE_TIMEOUT_S)
    except (OSError, ValueError) as error:
        raise TransportError("the peer's pool cannot be reached by tcp") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(encode_hello(offer.session_key))
        welcome = receive_within(connection, WELCOME_BYTES, timeout_s=HANDSHAKE_TIMEOUT_S)
        check_welcome(welcome, offer, memory)
        connection.settimeout(None)
    except (EOFError, OSError, FrameError) as error:
        connection.close()
        raise TransportError("the peer did not complete the handshake of its tcp transport") from error
    except BaseException:
        connection.close()
        raise
    return connection
