"""The shm transport: two processes, one memory, read-only; and descriptors that must not be mapped."""

import contextlib
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from kvtransfer.frames import HELLO_BYTES, PoolShape, WelcomeStatus, encode_hello, encode_welcome
from kvtransfer.memory import PROBE_BYTES, PoolMemory
from kvtransfer.shm import ShmExporter
from kvtransfer.transport import BlockRead, TransportOffer, open_reader
from staffetta.errors import TransportError
from tests.kvtransfer.pair import PAGE_BYTES, Pair, as_pages, make_pair
from tests.kvtransfer.peer import Peer

DEADLINE_S = 20.0  # never reached unless something hangs
SHAPE = PoolShape(2, 4096, PROBE_BYTES)
SIZE_BYTES = 2 * 4096 + PROBE_BYTES


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with make_pair("shm", tmp_path) as made:
        yield made


def fetch_descriptor(offer: TransportOffer) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(offer.endpoint)
        connection.sendall(encode_hello(offer.session_key))
        _, (descriptor,), _, _ = socket.recv_fds(connection, 64, 1)
        return descriptor


def is_ended_by_peer(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_blocks_of_another_process_arrive(tmp_path: Path) -> None:
    with Peer(tmp_path, num_blocks=40, page_bytes=5000) as peer:
        memory = PoolMemory(40, 5000)
        reader = open_reader(peer.offers["shm"], memory=memory)
        order = [int(block) for block in np.random.default_rng(2).permutation(40)]
        reads = [BlockRead(remote, local) for local, remote in enumerate(order)]
        assert reader.read(peer.ticket, reads).result(DEADLINE_S) == 40 * 5000
        assert np.array_equal(as_pages(memory), peer.pages[order])
        assert reader.measure().transport == "shm"
        reader.close()
        memory.close()


def test_a_killed_sender_does_not_fault_its_readers(tmp_path: Path) -> None:
    with Peer(tmp_path, num_blocks=4, page_bytes=4096) as peer:
        memory = PoolMemory(4, 4096)
        reader = open_reader(peer.offers["shm"], memory=memory)
        peer.kill()
        assert reader.read(peer.ticket, [BlockRead(1, 0)]).result(DEADLINE_S) == 4096
        assert np.array_equal(as_pages(memory)[0], peer.pages[1])
        reader.close()
        memory.close()


def test_a_stopped_sender_cannot_hold_up_opening_for_longer_than_the_handshake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.shm.HANDSHAKE_TIMEOUT_S", 0.1)
    with Peer(tmp_path, num_blocks=2, page_bytes=64) as peer:
        peer.stop()
        memory = PoolMemory(2, 64)
        with pytest.raises(TransportError, match="did not complete the handshake"):
            open_reader(peer.offers["shm"], memory=memory)
        memory.close()


def test_the_descriptor_that_a_peer_receives_cannot_be_used_to_write(pair: Pair) -> None:
    descriptor = fetch_descriptor(pair.offer)
    before = bytes(pair.remote.buffer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 4096)
    reopened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(reopened, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(reopened, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(reopened, 0)
    assert bytes(pair.remote.buffer) == before
    os.close(reopened)
    os.close(descriptor)


def test_the_socket_is_for_its_owner_alone_and_goes_with_the_exporter(pair: Pair) -> None:
    path = Path(pair.offer.endpoint)
    assert path.stat().st_mode & 0o777 == 0o600
    pair.exporter.close()
    assert not path.exists()


def test_a_peer_of_another_user_is_turned_away_by_the_sender(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.shm._peer_uid", lambda connection: os.geteuid() + 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(pair.offer.endpoint)
        with contextlib.suppress(BrokenPipeError):  # turned away before it could say hello
            connection.sendall(encode_hello(pair.offer.session_key))
        assert is_ended_by_peer(connection)


def test_a_sender_of_another_user_is_not_believed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.shm._peer_uid", lambda connection: os.geteuid() + 1)
    with pytest.raises(TransportError, match="runs as another user"):
        open_reader(pair.offer, memory=pair.local)


def test_a_wrong_key_is_told_so_and_gets_no_descriptor(pair: Pair) -> None:
    with pytest.raises(TransportError, match="refused the shm transport: UNKNOWN_SESSION"):
        open_reader(replace(pair.offer, session_key=bytes(32)), memory=pair.local)


def test_a_peer_that_says_nothing_is_cut_off_and_disturbs_nobody(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.shm.HANDSHAKE_TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.settimeout(DEADLINE_S)
        silent.connect(pair.offer.endpoint)
        open_reader(pair.offer, memory=pair.local).close()
        assert silent.recv(1) == b""


@pytest.mark.parametrize("said", [bytes(HELLO_BYTES), b"STKV\x02\0\0\0" + bytes(32), b"STKV"])
def test_a_malformed_or_truncated_hello_is_not_answered(pair: Pair, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(pair.offer.endpoint)
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(64) == b""
    assert pair.reader.read(b"", [BlockRead(1, 1)]).result(DEADLINE_S) == PAGE_BYTES


def test_memory_that_is_not_shareable_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    memory = PoolMemory(2, 4096)
    with pytest.raises(ValueError, match="take shm out of transports"):
        ShmExporter(memory, directory=tmp_path)


def test_a_peer_without_the_sockets_directory_cannot_be_reached(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="its socket is not here"):
        open_reader(replace(pair.offer, endpoint=str(tmp_path / "elsewhere.sock")), memory=pair.local)


def test_an_endpoint_longer_than_a_socket_path_is_refused(pair: Pair) -> None:
    with pytest.raises(TransportError, match="a path of more than 107 bytes"):
        open_reader(replace(pair.offer, endpoint="/" + "d" * 107), memory=pair.local)


@contextmanager
def lying_sender(directory: Path, answer: Callable[[socket.socket], None]) -> Iterator[TransportOffer]:
    """A server on a Unix socket whose `answer` handles its one connection."""
    path = directory / "liar.sock"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(1)

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(HELLO_BYTES)
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield TransportOffer("shm", str(path), bytes(32), SHAPE.num_blocks)
    finally:
        thread.join()
        listening.close()


def make_memfd(size_bytes: int, seals: int) -> int:
    descriptor = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@pytest.mark.parametrize(
    ("size_bytes", "seals", "message"),
    [
        (SIZE_BYTES, 0, "not sealed against shrinking"),
        (SIZE_BYTES, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE, "not sealed against shrinking"),
        (SIZE_BYTES - 1, fcntl.F_SEAL_SHRINK, f"has {SIZE_BYTES - 1} bytes, expected {SIZE_BYTES}"),
        (0, fcntl.F_SEAL_SHRINK, f"has 0 bytes, expected {SIZE_BYTES}"),
    ],
)
def test_memory_that_could_shrink_or_is_too_small_is_not_mapped(
    tmp_path: Path, size_bytes: int, seals: int, message: str
) -> None:
    descriptor = make_memfd(size_bytes, seals)
    welcome = encode_welcome(WelcomeStatus.ACCEPTED, SHAPE)
    memory = PoolMemory(4, 4096)

    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [welcome], [descriptor])

    num_descriptors = psutil.Process().num_fds()
    with lying_sender(tmp_path, answer) as offer, pytest.raises(TransportError, match=message):
        open_reader(offer, memory=memory)
    assert psutil.Process().num_fds() == num_descriptors
    os.close(descriptor)
    memory.close()


def test_a_descriptor_that_is_an_ordinary_file_or_a_pipe_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE_BYTES))
    welcome = encode_welcome(WelcomeStatus.ACCEPTED, SHAPE)
    memory = PoolMemory(4, 4096)
    read_end, write_end = os.pipe()
    file_descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    for number, descriptor in enumerate((file_descriptor, read_end)):
        directory = tmp_path / str(number)
        directory.mkdir()

        def answer(connection: socket.socket, descriptor: int = descriptor) -> None:
            socket.send_fds(connection, [welcome], [descriptor])

        with lying_sender(directory, answer) as offer, pytest.raises(TransportError, match="not sealed"):
            open_reader(offer, memory=memory)
    for descriptor in (read_end, write_end, file_descriptor):
        os.close(descriptor)
    memory.close()


def test_a_welcome_without_a_descriptor_is_refused(tmp_path: Path) -> None:
    memory = PoolMemory(4, 4096)
    welcome = encode_welcome(WelcomeStatus.ACCEPTED, SHAPE)
    with (
        lying_sender(tmp_path, lambda connection: connection.sendall(welcome)) as offer,
        pytest.raises(TransportError, match="sent no descriptor"),
    ):
        open_reader(offer, memory=memory)
    memory.close()
