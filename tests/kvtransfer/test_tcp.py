"""The tcp transport against peers that lie, stop, die or talk nonsense, and against tickets that do not fit."""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtransfer.connection import receive_exactly, receive_within
from kvtransfer.frames import (
    HELLO_BYTES,
    REPLY_HEAD_BYTES,
    WELCOME_BYTES,
    PoolShape,
    Region,
    Run,
    WelcomeStatus,
    encode_hello,
    encode_reply,
    encode_request,
    encode_welcome,
    parse_reply,
    parse_welcome,
)
from kvtransfer.memory import PROBE_BYTES, PoolMemory
from kvtransfer.sessions import MAX_SESSION_CONNECTIONS
from kvtransfer.tcp import FRAME_BYTES, plan_frames
from kvtransfer.ticket import TicketBook, TicketVerdict
from kvtransfer.transport import BlockRead, TransportOffer, export, open_reader
from staffetta.address import parse_address
from staffetta.errors import TransportError
from staffetta.failpoint import arm
from tests.kvtransfer.pair import NUM_LOCAL_BLOCKS, PAGE_BYTES, Pair, make_pair
from tests.kvtransfer.peer import Peer

DEADLINE_S = 20.0  # never reached unless something hangs
ALL_READS = [BlockRead(block, block) for block in range(NUM_LOCAL_BLOCKS)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with make_pair("tcp", tmp_path) as made:
        yield made


def assert_healthy(pair: Pair) -> None:
    """The pair still moves blocks, whatever happened to other connections or reads."""
    assert pair.reader.read(pair.ticket, [BlockRead(3, 3)]).result(DEADLINE_S) == PAGE_BYTES
    assert np.array_equal(pair.local_pages[3], pair.remote_pages[3])


@contextmanager
def raw_connection(pair: Pair, session_key: bytes | None = None) -> Iterator[socket.socket]:
    """A connection that has said hello, and been welcomed when the key is right; every call on it has a deadline."""
    with socket.create_connection(parse_address(pair.offer.endpoint), timeout=DEADLINE_S) as connection:
        connection.sendall(encode_hello(pair.offer.session_key if session_key is None else session_key))
        yield connection


def accept_welcome(connection: socket.socket) -> WelcomeStatus:
    status, _ = parse_welcome(receive_within(connection, WELCOME_BYTES, timeout_s=DEADLINE_S))
    return status


def is_ended_by_peer(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# Tickets


def test_a_ticket_for_other_blocks_is_refused_and_the_connection_goes_on(pair: Pair) -> None:
    ticket = pair.tickets.issue("request", {pair.offer.session_key}, [1, 2], lease_s=600)
    with pytest.raises(TransportError, match="ticket OTHER_BLOCKS"):
        pair.reader.read(ticket, [BlockRead(1, 0), BlockRead(3, 1)]).result(DEADLINE_S)
    assert not pair.local_pages.any()
    assert_healthy(pair)


def test_every_frame_of_a_read_is_checked_not_only_the_first(pair: Pair) -> None:
    ticket = pair.tickets.issue("request", {pair.offer.session_key}, range(NUM_LOCAL_BLOCKS - 1), lease_s=600)
    assert len(ALL_READS) * PAGE_BYTES > 2 * FRAME_BYTES
    with pytest.raises(TransportError, match="ticket OTHER_BLOCKS"):
        pair.reader.read(ticket, ALL_READS).result(DEADLINE_S)
    assert not pair.local_pages[-1].any()
    assert_healthy(pair)


def test_an_expired_ticket_is_refused(pair: Pair) -> None:
    ticket = pair.tickets.issue("request", {pair.offer.session_key}, [1], lease_s=0)
    with pytest.raises(TransportError, match="ticket EXPIRED"):
        pair.reader.read(ticket, [BlockRead(1, 0)]).result(DEADLINE_S)
    assert_healthy(pair)


def test_a_revoked_ticket_is_refused(pair: Pair) -> None:
    ticket = pair.tickets.issue("request", {pair.offer.session_key}, [1], lease_s=600)
    pair.tickets.revoke(ticket)
    with pytest.raises(TransportError, match="ticket UNKNOWN"):
        pair.reader.read(ticket, [BlockRead(1, 0)]).result(DEADLINE_S)
    assert_healthy(pair)


def test_another_sessions_ticket_is_refused(pair: Pair) -> None:
    ticket = pair.tickets.issue("request", {pair.exporter.offer().session_key}, [1], lease_s=600)
    with pytest.raises(TransportError, match="ticket OTHER_SESSION"):
        pair.reader.read(ticket, [BlockRead(1, 0)]).result(DEADLINE_S)
    assert_healthy(pair)


def test_a_ticket_of_the_wrong_length_never_reaches_the_wire(pair: Pair) -> None:
    with pytest.raises(TransportError, match="the peer's ticket has 15 bytes, needs 16"):
        pair.reader.read(bytes(15), [BlockRead(1, 0)]).result(DEADLINE_S)
    assert_healthy(pair)


def test_the_probe_needs_no_ticket_and_blocks_are_not_reached_through_it(pair: Pair) -> None:
    with raw_connection(pair) as connection:
        assert accept_welcome(connection) is WelcomeStatus.ACCEPTED
        connection.sendall(encode_request(Region.PROBE, bytes(16), [Run(63, 1)]))
        reply = receive_exactly(connection, REPLY_HEAD_BYTES)
        assert parse_reply(reply, expected_bytes=65536) is TicketVerdict.VALID
        assert receive_exactly(connection, 65536) == bytes(pair.remote.probe[-65536:])
        connection.sendall(encode_request(Region.PROBE, bytes(16), [Run(64, 1)]))
        assert is_ended_by_peer(connection)


# The sender's parser


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n----------------",
        bytes(24),
        encode_request(Region.BLOCKS, bytes(16), [Run(0, 0)]),
        encode_request(Region.BLOCKS, bytes(16), [Run(899, 2)]),
        encode_request(Region.BLOCKS, bytes(16), [Run(2**32 - 1, 2**32 - 1)]),
        encode_request(Region.BLOCKS, bytes(16), [Run(0, 300), Run(0, 300)]),
        b"STRQ\x01\0\xff\xff" + bytes(16),
        b"STRQ\x01\0\x00\x00" + bytes(16),
        b"STRQ\x03\0\x01\x00" + bytes(24),
    ],
)
def test_a_malformed_request_ends_its_own_connection_only(pair: Pair, said: bytes) -> None:
    with raw_connection(pair) as connection:
        assert accept_welcome(connection) is WelcomeStatus.ACCEPTED
        connection.sendall(said)
        assert is_ended_by_peer(connection)
    assert_healthy(pair)


@pytest.mark.parametrize("said", [b"\0" * HELLO_BYTES, b"STKV\x02\0\0\0" + bytes(32), b"STKV"])
def test_a_malformed_or_truncated_hello_is_not_answered(pair: Pair, said: bytes) -> None:
    with socket.create_connection(parse_address(pair.offer.endpoint), timeout=DEADLINE_S) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert is_ended_by_peer(connection)
    assert_healthy(pair)


def test_random_bytes_on_live_connections_do_not_disturb_the_others(pair: Pair) -> None:
    rng = random.Random(11)
    request = encode_request(Region.BLOCKS, pair.ticket, [Run(0, 2), Run(9, 1)])
    for _ in range(150):
        with raw_connection(pair) as connection:
            assert accept_welcome(connection) is WelcomeStatus.ACCEPTED
            data = bytearray(request)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            connection.sendall(bytes(data[: rng.randrange(len(data) + 1)]))
            with contextlib.suppress(OSError):  # the sender may have ended the connection already
                connection.shutdown(socket.SHUT_WR)
            while not is_ended_by_peer(connection):
                pass
    assert_healthy(pair)


def test_a_peer_that_says_nothing_is_cut_off_and_disturbs_nobody(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.tcp.HANDSHAKE_TIMEOUT_S", 0.05)
    with socket.create_connection(parse_address(pair.offer.endpoint), timeout=DEADLINE_S) as silent:
        silent.sendall(b"STKV")
        assert_healthy(pair)
        assert is_ended_by_peer(silent)


def test_a_session_has_a_bounded_number_of_connections(pair: Pair) -> None:
    second = open_reader(pair.offer, memory=pair.local)  # two connections each
    assert MAX_SESSION_CONNECTIONS == 4
    with raw_connection(pair) as connection:
        assert accept_welcome(connection) is WelcomeStatus.TOO_MANY_CONNECTIONS
        assert is_ended_by_peer(connection)
    second.close()
    assert_healthy(pair)


def test_withdrawing_cuts_the_sessions_connections_and_no_others(pair: Pair) -> None:
    other_offer = pair.exporter.offer()
    other = open_reader(other_offer, memory=pair.local)
    pair.exporter.withdraw(other_offer.session_key)
    with pytest.raises(TransportError, match="the connection to the peer broke"):
        other.read(pair.ticket, [BlockRead(0, 0)]).result(DEADLINE_S)
    other.close()
    assert_healthy(pair)


def test_closing_the_exporter_ends_a_reader_that_is_in_the_middle(pair: Pair) -> None:
    futures = [pair.reader.read(pair.ticket, ALL_READS) for _ in range(20)]
    pair.exporter.close()
    assert {type(future.exception(DEADLINE_S)) for future in futures} <= {type(None), TransportError}
    with pytest.raises(TransportError, match="the connection to the peer broke"):
        pair.reader.read(pair.ticket, ALL_READS).result(DEADLINE_S)


def test_an_exception_while_serving_ends_that_connection_only(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    other = open_reader(pair.offer, memory=pair.local)
    arm(("tcp.serving:raise:1",))
    with pytest.raises(TransportError, match="the connection to the peer broke"):
        other.read(pair.ticket, [BlockRead(0, 0)]).result(DEADLINE_S)
    arm(())
    assert_healthy(pair)
    other.close()
    assert "kv-tcp: connection failed" in caplog.text


# The reader's parser


@contextmanager
def lying_sender(answer: Callable[[socket.socket], None]) -> Iterator[TransportOffer]:
    """A server whose `answer` handles each connection; ends when the reader has closed its side."""
    listening = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        for _ in range(2):
            try:
                connection, _ = listening.accept()
            except OSError:  # the test is over
                return
            connections.append(connection)
            receive_exactly(connection, HELLO_BYTES)
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield TransportOffer("tcp", f"127.0.0.1:{listening.getsockname()[1]}", bytes(32), 8)
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
        for connection in connections:
            connection.close()


GOOD_WELCOME = encode_welcome(WelcomeStatus.ACCEPTED, PoolShape(8, 4096, PROBE_BYTES))


@pytest.mark.parametrize(
    ("welcome", "message"),
    [
        (b"", "did not complete the handshake"),
        (GOOD_WELCOME[:-1], "did not complete the handshake"),
        (bytes(WELCOME_BYTES), "did not complete the handshake"),
        (encode_welcome(WelcomeStatus.UNKNOWN_SESSION, PoolShape(8, 4096, PROBE_BYTES)), "UNKNOWN_SESSION"),
        (encode_welcome(WelcomeStatus.ACCEPTED, PoolShape(9, 4096, PROBE_BYTES)), "num_blocks=9"),
        (encode_welcome(WelcomeStatus.ACCEPTED, PoolShape(8, 2**63, PROBE_BYTES)), "page_bytes=9223372036854775808"),
        (encode_welcome(WelcomeStatus.ACCEPTED, PoolShape(8, 4096, 0)), "probe_bytes=0"),
    ],
)
def test_a_welcome_that_is_not_the_expected_one_is_refused(welcome: bytes, message: str) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(welcome)
        connection.shutdown(socket.SHUT_WR)

    memory = PoolMemory(8, 4096)
    with lying_sender(answer) as offer, pytest.raises(TransportError, match=message):
        open_reader(offer, memory=memory)
    memory.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"STRP",
        bytes(REPLY_HEAD_BYTES),
        b"STRP\x09" + bytes(11),
        encode_reply(TicketVerdict.VALID, 4095) + bytes(4095),
        encode_reply(TicketVerdict.VALID, 4097) + bytes(4097),
        encode_reply(TicketVerdict.VALID, 2**64 - 1),
        encode_reply(TicketVerdict.EXPIRED, 4096) + bytes(4096),
        encode_reply(TicketVerdict.VALID, 4096) + bytes(4095),
    ],
)
def test_a_reply_that_is_wrong_or_short_fails_the_read_and_touches_no_other_block(reply: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(GOOD_WELCOME + reply)
        connection.shutdown(socket.SHUT_WR)

    memory = PoolMemory(8, 4096)
    memory.buffer[:] = b"\x55" * len(memory.buffer)
    with lying_sender(answer) as offer:
        reader = open_reader(offer, memory=memory)
        with pytest.raises(TransportError, match="the connection to the peer broke"):
            reader.read(bytes(16), [BlockRead(1, 2)]).result(DEADLINE_S)
        reader.close()
    assert bytes(memory.buffer[: 2 * 4096]) == b"\x55" * (2 * 4096)
    assert bytes(memory.buffer[3 * 4096 :]) == b"\x55" * (5 * 4096)
    memory.close()


def test_a_self_test_that_is_not_answered_gives_up_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.tcp.SELFTEST_TIMEOUT_S", 0.05)
    memory = PoolMemory(8, 4096)
    with lying_sender(lambda connection: connection.sendall(GOOD_WELCOME)) as offer:
        reader = open_reader(offer, memory=memory)
        with pytest.raises(TransportError, match="did not answer the tcp self-test"):
            reader.measure()
        with pytest.raises(TransportError, match="the transport was closed"):
            reader.read(bytes(16), [BlockRead(1, 2)]).result(DEADLINE_S)
    memory.close()


# Other processes


def test_a_sender_killed_while_serving_fails_the_read_and_leaves_no_future_behind(tmp_path: Path) -> None:
    with Peer(tmp_path, num_blocks=64, page_bytes=FRAME_BYTES // 4, failpoint="tcp.serving:kill:5") as peer:
        memory = PoolMemory(64, FRAME_BYTES // 4)
        reader = open_reader(peer.offers["tcp"], memory=memory)
        futures = [reader.read(peer.ticket, [BlockRead(block, block)]) for block in range(64)]
        errors = [future.exception(DEADLINE_S) for future in futures]
        num_read = errors.count(None)
        assert 3 <= num_read <= 4  # the fifth frame killed the sender; the fourth may have been on its way
        assert {str(error) for error in errors if error is not None} == {"the connection to the peer broke"}
        for block, error in enumerate(errors):
            if error is None:
                assert (
                    bytes(memory.buffer[block * FRAME_BYTES // 4 :][: FRAME_BYTES // 4]) == peer.pages[block].tobytes()
                )
        reader.close()
        memory.close()


def test_a_stopped_sender_holds_the_blocks_until_close_and_no_longer(tmp_path: Path) -> None:
    with Peer(tmp_path, num_blocks=64, page_bytes=FRAME_BYTES // 4) as peer:
        memory = PoolMemory(64, FRAME_BYTES // 4)
        reader = open_reader(peer.offers["tcp"], memory=memory)
        assert reader.read(peer.ticket, [BlockRead(0, 0)]).result(DEADLINE_S) == FRAME_BYTES // 4
        peer.stop()
        futures = [reader.read(peer.ticket, [BlockRead(block, block)]) for block in range(1, 64)]
        assert not any(future.done() for future in futures)
        reader.close()
        assert {str(future.exception(0)) for future in futures} <= {
            "the transport was closed",
            "the connection to the peer broke",
        }
        memory.close()


def test_a_stopped_sender_cannot_hold_up_opening_for_longer_than_the_handshake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.tcp.HANDSHAKE_TIMEOUT_S", 0.1)
    with Peer(tmp_path, num_blocks=2, page_bytes=64) as peer:
        peer.stop()
        memory = PoolMemory(2, 64)
        with pytest.raises(TransportError, match="did not complete the handshake"):
            open_reader(peer.offers["tcp"], memory=memory)
        memory.close()


def test_a_reader_that_stops_reading_does_not_keep_the_exporter_from_closing(pair: Pair) -> None:
    with raw_connection(pair) as connection:
        assert accept_welcome(connection) is WelcomeStatus.ACCEPTED
        for _ in range(50):  # answers far beyond any socket buffer, which nobody receives
            connection.sendall(encode_request(Region.PROBE, bytes(16), [Run(0, 64)]))
        pair.exporter.close()


# Addresses and frames


@pytest.mark.parametrize("endpoint", ["", "host", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:65536", ":80"])
def test_an_endpoint_that_is_no_address_is_a_peer_that_cannot_be_reached(pair: Pair, endpoint: str) -> None:
    with pytest.raises(TransportError, match="cannot be reached by tcp"):
        open_reader(replace(pair.offer, endpoint=endpoint), memory=pair.local)


@pytest.mark.parametrize(
    ("advertise", "expected"),
    [
        ("", "127.0.0.1:{port}"),
        ("worker-3:0", "worker-3:{port}"),
        ("worker-3:77", "worker-3:77"),
        ("[::1]:77", "[::1]:77"),
    ],
)
def test_the_offer_names_what_is_advertised(advertise: str, expected: str) -> None:
    memory = PoolMemory(1, 64)
    exporter = export("tcp", memory, tickets=TicketBook(), shm_dir=Path(), listen="127.0.0.1:0", advertise=advertise)
    port = exporter._listener._listening.getsockname()[1]  # type: ignore[attr-defined]
    assert exporter.offer().endpoint == expected.format(port=port)
    exporter.close()
    memory.close()


def test_frames_join_adjacent_blocks_on_each_side_for_itself() -> None:
    memory = memoryview(bytearray(100))
    reads = [BlockRead(4, 0), BlockRead(5, 2), BlockRead(6, 3), BlockRead(9, 4)]
    (frame,) = plan_frames(Region.BLOCKS, bytes(16), reads, memory=memory, unit_bytes=10)
    assert frame.runs == [Run(4, 3), Run(9, 1)]
    assert [len(view) for view in frame.views] == [10, 30]
    assert frame.num_bytes == 40


def test_frames_are_bounded_by_bytes_and_by_blocks() -> None:
    memory = memoryview(bytearray(4096))
    reads = [BlockRead(block, 0) for block in range(1030)]
    assert [len(plan.runs) for plan in plan_frames(Region.BLOCKS, b"", reads, memory=memory, unit_bytes=1)] == [1, 1, 1]
    frames = plan_frames(Region.BLOCKS, b"", reads, memory=memory, unit_bytes=1)
    assert [frame.num_bytes for frame in frames] == [512, 512, 6]
    large = memoryview(bytearray(3 * FRAME_BYTES))
    reads = [BlockRead(block, block) for block in range(3)]
    frames = plan_frames(Region.BLOCKS, b"", reads, memory=large, unit_bytes=FRAME_BYTES)
    assert [frame.num_bytes for frame in frames] == [FRAME_BYTES] * 3
    assert struct.calcsize("<4sBxH16s") + 512 * 8 < 8192  # a request fits any socket buffer
