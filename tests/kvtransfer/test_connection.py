"""Exact sends and receives over a socket pair, and a listener that ends what it began."""

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest

from kvtransfer.connection import receive_exactly, receive_into, receive_within, send_views, shut
from kvtransfer.listener import Listener

DEADLINE_S = 20.0  # never reached unless something hangs


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_views_are_sent_whole_and_in_order_however_little_the_socket_takes(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    sender, receiver = ends
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    data = bytes(range(256)) * 2000
    views = [memoryview(data)[:1], memoryview(data)[1:1], memoryview(data)[1:300_001], memoryview(data)[300_001:]]
    sending = threading.Thread(target=send_views, args=(sender, views))
    sending.start()
    received = bytearray(len(data))
    receive_into(receiver, memoryview(received))
    sending.join()
    assert received == data


def test_a_peer_that_ends_in_the_middle_is_an_end_of_file(ends: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = ends
    sender.sendall(b"abc")
    sender.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        receive_exactly(receiver, 4)


def test_cutting_a_connection_frees_a_thread_that_is_blocked_in_it(ends: tuple[socket.socket, socket.socket]) -> None:
    _, receiver = ends
    ended = threading.Event()

    def receive() -> None:
        with pytest.raises(EOFError):
            receive_exactly(receiver, 1)
        ended.set()

    receiving = threading.Thread(target=receive)
    receiving.start()
    shut(receiver)
    assert ended.wait(DEADLINE_S)
    receiving.join()
    shut(receiver)


def test_a_deadline_is_for_the_whole_message_and_cannot_be_stretched_byte_by_byte(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    seconds = itertools.count()
    monkeypatch.setattr("kvtransfer.connection.time.monotonic", lambda: next(seconds))
    real_receive = receiver.recv

    class Dribble:
        """A connection whose peer sends one byte each time it is asked, a second apart."""

        settimeout = receiver.settimeout

        def recv(self, _: int) -> bytes:
            sender.sendall(b"x")
            return real_receive(1)

    with pytest.raises(TimeoutError):
        receive_within(Dribble(), 100, timeout_s=5)  # type: ignore[arg-type]
    assert next(seconds) == 6


def test_connections_beyond_the_bound_are_closed_unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.listener.MAX_CONNECTIONS", 1)

    def echo(connection: socket.socket) -> None:
        while True:
            connection.sendall(receive_exactly(connection, 1))

    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()
    listener = Listener(listening, echo, name="test")
    with (
        socket.create_connection(address, DEADLINE_S) as first,
        socket.create_connection(address, DEADLINE_S) as second,
    ):
        first.sendall(b"1")
        assert first.recv(1) == b"1"
        assert second.recv(1) == b""
        first.sendall(b"2")
        assert first.recv(1) == b"2"
        listener.close()
        assert first.recv(1) == b""
    listener.close()
