"""The shm transport: the reader maps the sender's memory, read-only, and copies. For workers of one user on one host.

The sender hands a read-only descriptor of its sealed memfd over a Unix socket, to a peer of the same user who shows a
session key; then the connection is over. Blocks are not addressed by ticket here: who holds the mapping can read the
whole pool, until it unmaps. The trust boundary is the authenticated worker on the same host. A withdrawn offer opens
no new mapping; a reader that comes too late for a block is told so by the block's checksums.

Containers share nothing by default: without a common volume for the socket, connecting fails, and the pair uses tcp.
"""

import mmap
import os
import secrets
import socket
import stat
import struct
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from kvtransfer.connection import receive_within
from kvtransfer.frames import (
    HELLO_BYTES,
    WELCOME_BYTES,
    FrameError,
    PoolShape,
    WelcomeStatus,
    encode_hello,
    encode_welcome,
    parse_hello,
)
from kvtransfer.lanes import Lanes, failed_read
from kvtransfer.listener import Listener
from kvtransfer.memory import PROBE_BYTES, PoolMemory, has_shrink_seal, map_file
from kvtransfer.selftest import run_selftest
from kvtransfer.sessions import Sessions, check_welcome
from kvtransfer.transport import BlockRead, SelfTest, TransportOffer, check_reads, merge_runs
from staffetta.errors import TransportError

HANDSHAKE_TIMEOUT_S: Final = 3.0
LISTEN_BACKLOG: Final = 64
MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path holds 108 with the final zero
PART_BYTES: Final = 4 * 1024 * 1024  # copied without looking up; bounds how long `close` waits

Bytes: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"

_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


class ShmExporter:
    """Hands out read-only descriptors of a pool."""

    def __init__(self, memory: PoolMemory, *, directory: Path) -> None:
        if not memory.is_shareable:
            raise ValueError("shm needs a sealed memfd, which this system lacks: take shm out of transports")
        self.transport = "shm"
        self._memory = memory
        self._sessions = Sessions()
        self._path = directory / f"kv-{secrets.token_hex(8)}.sock"
        if (num_bytes := len(os.fsencode(self._path))) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"the socket's path would have {num_bytes} bytes and may have {MAX_SOCKET_PATH_BYTES}:"
                f" set shm_dir to a path at least {num_bytes - MAX_SOCKET_PATH_BYTES} bytes shorter"
            )
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(os.fspath(self._path))
            self._path.chmod(0o600)  # before listening, so nobody else ever connects
            listening.listen(LISTEN_BACKLOG)
        except BaseException:
            listening.close()
            raise
        self._listener = Listener(listening, self._serve, name="kv-shm")

    def offer(self) -> TransportOffer:
        """As KVExporter says."""
        return TransportOffer(self.transport, os.fspath(self._path), self._sessions.begin(), self._memory.num_blocks)

    def withdraw(self, session_key: bytes) -> None:
        """As KVExporter says. What the peer has mapped stays mapped until it closes its reader."""
        self._sessions.end(session_key)

    def close(self) -> None:
        """As KVExporter says."""
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self, connection: socket.socket) -> None:
        if _peer_uid(connection) != os.geteuid():
            raise FrameError("the peer runs as another user")
        session_key = parse_hello(receive_within(connection, HELLO_BYTES, timeout_s=HANDSHAKE_TIMEOUT_S))
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        status = self._sessions.join(session_key, connection)
        try:
            welcome = encode_welcome(status, PoolShape(self._memory.num_blocks, self._memory.page_bytes, PROBE_BYTES))
            if status is not WelcomeStatus.ACCEPTED:
                connection.sendall(welcome)
                return
            descriptor = self._memory.read_only_fd()
            try:
                socket.send_fds(connection, [welcome], [descriptor])
            finally:
                os.close(descriptor)
        finally:
            self._sessions.leave(session_key, connection)


@dataclass(frozen=True, slots=True)
class _Copies:
    """Pieces to copy: each from an offset in the peer's memory to a place in ours, which has the piece's length."""

    pieces: list[tuple[int, Bytes]]
    num_bytes: int


class _CopyLane:
    """The thread that copies. It owns the mapping of the peer's memory."""

    def __init__(self, mapping: memoryview) -> None:
        self._remote: Bytes = np.frombuffer(mapping, dtype=np.uint8)

    def move(self, part: _Copies) -> None:
        for start, destination in part.pieces:
            np.copyto(destination, self._remote[start : start + destination.size])  # without the interpreter's lock

    def cut(self) -> None:
        """Does nothing: no call here blocks for longer than one part takes."""

    def close(self) -> None:
        """Unmaps the peer's memory."""
        self._remote = np.empty(0, dtype=np.uint8)


class ShmReader:
    """Copies blocks out of a peer's mapped memory."""

    def __init__(self, offer: TransportOffer, memory: PoolMemory) -> None:
        self.transport = "shm"
        self._memory = memory
        self._local: Bytes = np.frombuffer(memory.buffer, dtype=np.uint8)
        self._num_remote_blocks = offer.num_blocks
        self._lanes: Lanes[_Copies] = Lanes([_CopyLane(_map_peer(offer, memory))], name="kv-shm-read")

    def read(self, ticket: bytes, reads: Sequence[BlockRead]) -> "Future[int]":
        """As KVReader says; the ticket is not needed."""
        try:
            check_reads(reads, num_remote_blocks=self._num_remote_blocks, num_local_blocks=self._memory.num_blocks)
        except TransportError as error:
            return failed_read(error)
        part_blocks = max(1, PART_BYTES // self._memory.page_bytes)
        return self._lanes.submit(
            [self._plan(reads[start : start + part_blocks]) for start in range(0, len(reads), part_blocks)]
        )

    def measure(self) -> SelfTest:
        """As KVReader says."""
        return run_selftest(self.transport, self._read_probe, expected=self._memory.probe)

    def close(self) -> None:
        """As KVReader says."""
        self._lanes.close()

    def _plan(self, reads: Sequence[BlockRead]) -> _Copies:
        page_bytes = self._memory.page_bytes
        pieces = [
            (remote * page_bytes, self._local[local * page_bytes : (local + count) * page_bytes])
            for remote, local, count in merge_runs(reads)
        ]
        return _Copies(pieces, len(reads) * page_bytes)

    def _read_probe(self, buffer: memoryview) -> None:
        start = self._num_remote_blocks * self._memory.page_bytes
        self._lanes.submit([_Copies([(start, np.frombuffer(buffer, dtype=np.uint8))], len(buffer))]).result()


def _map_peer(offer: TransportOffer, memory: PoolMemory) -> memoryview:
    """Fetches the peer's descriptor and maps it for reading."""
    if len(os.fsencode(offer.endpoint)) > MAX_SOCKET_PATH_BYTES:
        raise TransportError(f"the peer's shm socket has a path of more than {MAX_SOCKET_PATH_BYTES} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        try:
            connection.connect(offer.endpoint)
        except OSError as error:
            raise TransportError("the peer's memory cannot be reached by shm: its socket is not here") from error
        try:
            return _receive_mapping(connection, offer, memory)
        except (EOFError, OSError, FrameError) as error:
            raise TransportError("the peer did not complete the handshake of its shm transport") from error


def _receive_mapping(connection: socket.socket, offer: TransportOffer, memory: PoolMemory) -> memoryview:
    if _peer_uid(connection) != os.geteuid():
        raise TransportError("the process behind the peer's shm socket runs as another user")
    connection.sendall(encode_hello(offer.session_key))
    welcome, descriptors, _, _ = socket.recv_fds(connection, WELCOME_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        shape = check_welcome(welcome, offer, memory)
        if len(descriptors) != 1:
            raise TransportError("the peer accepted the shm transport and sent no descriptor")
        return _map_read_only(descriptors[0], shape)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _map_read_only(descriptor: int, shape: PoolShape) -> memoryview:
    """Maps all of a peer's memory, after making sure that no access to the mapping can ever fault."""
    size_bytes = shape.num_blocks * shape.page_bytes + shape.probe_bytes
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not has_shrink_seal(descriptor):
        raise TransportError("the peer's memory is not sealed against shrinking; reading it could end this process")
    if status.st_size != size_bytes:
        raise TransportError(f"the peer's memory has {status.st_size} bytes, expected {size_bytes}")
    return map_file(descriptor, size_bytes, protection=mmap.PROT_READ)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
    return int(uid)
