"""The framing, byte by byte: what is packed, what parses back, and that everything else is a FrameError."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.frames import (
    MAX_FRAME_UNITS,
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
    parse_welcome,
    to_runs,
    to_views,
)
from kvtransfer.ticket import TicketVerdict
from tests.kvtransfer.fuzz_tcp import fuzz

TICKET = bytes(range(16))
KEY = bytes(range(32))


def test_each_message_has_the_bytes_that_the_map_shows() -> None:
    assert encode_hello(KEY) == b"STKV\x01\0\0\0" + KEY
    welcome = encode_welcome(WelcomeStatus.UNKNOWN_SESSION, PoolShape(2, 3, 4))
    assert welcome == b"STKV\x01\x01\0\0" + b"\x02" + bytes(7) + b"\x03" + bytes(7) + b"\x04" + bytes(7)
    request = encode_request(Region.BLOCKS, TICKET, [Run(1, 2), Run(256, 1)])
    assert request == b"STRQ\x01\0\x02\0" + TICKET + b"\x01\0\0\0\x02\0\0\0" + b"\0\x01\0\0\x01\0\0\0"
    assert encode_reply(TicketVerdict.EXPIRED, 0x0102) == b"STRP\x02\0\0\0" + b"\x02\x01" + bytes(6)


def test_what_was_packed_parses_back() -> None:
    assert parse_hello(encode_hello(KEY)) == KEY
    shape = PoolShape(512, 49152, 2**22)
    assert parse_welcome(encode_welcome(WelcomeStatus.ACCEPTED, shape)) == (WelcomeStatus.ACCEPTED, shape)
    request = encode_request(Region.PROBE, TICKET, [Run(0, 16), Run(20, 2)])
    assert parse_request_head(request[:24]) == (Region.PROBE, 2, TICKET)
    assert parse_runs(request[24:], num_runs=2, num_units=22) == (Run(0, 16), Run(20, 2))
    assert parse_reply(encode_reply(TicketVerdict.VALID, 77), expected_bytes=77) is TicketVerdict.VALID


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Run(0, 0)], "run of 0 units from 0 is not in a region of 600 units"),
        ([Run(600, 1)], "run of 1 units from 600 is not in a region of 600 units"),
        ([Run(599, 2)], "run of 2 units from 599 is not in a region of 600 units"),
        ([Run(0, 2**32 - 1)], "run of 4294967295 units from 0 is not in a region of 600 units"),
        ([Run(2**32 - 1, 2**32 - 1)], "run of 4294967295 units from 4294967295 is not in a region of 600 units"),
        ([Run(0, 256), Run(256, 257)], "request names 513 units, may name 512"),
    ],
)
def test_runs_outside_their_region_or_too_long_are_refused(runs: list[Run], message: str) -> None:
    body = encode_request(Region.BLOCKS, TICKET, runs)[24:]
    with pytest.raises(FrameError) as caught:
        parse_runs(body, num_runs=len(runs), num_units=600)
    assert str(caught.value) == message


@pytest.mark.parametrize("num_runs", [0, MAX_FRAME_UNITS + 1])
def test_the_number_of_runs_is_bounded_before_anything_is_received(num_runs: int) -> None:
    head = encode_request(Region.BLOCKS, TICKET, [])
    with pytest.raises(FrameError, match=f"request has {num_runs} runs, may have 1 to 512"):
        parse_request_head(head[:6] + num_runs.to_bytes(2, "little") + head[8:])


def test_a_reply_must_announce_exactly_the_bytes_that_were_asked_for() -> None:
    for verdict, num_bytes in ((TicketVerdict.VALID, 76), (TicketVerdict.VALID, 78), (TicketVerdict.EXPIRED, 77)):
        with pytest.raises(FrameError, match="bytes of reply"):
            parse_reply(encode_reply(verdict, num_bytes), expected_bytes=77)


def test_truncated_and_overlong_messages_are_refused() -> None:
    hello, reply = encode_hello(KEY), encode_reply(TicketVerdict.VALID, 1)
    welcome = encode_welcome(WelcomeStatus.ACCEPTED, PoolShape(1, 1, 1))
    head = encode_request(Region.BLOCKS, TICKET, [])
    for data in (b"", hello[:-1], hello + b"\0"):
        with pytest.raises(FrameError, match="expected 40 bytes"):
            parse_hello(data)
    for data in (b"", welcome[:-1], welcome + b"\0"):
        with pytest.raises(FrameError, match="expected 32 bytes"):
            parse_welcome(data)
    for data in (b"", head[:-1], head + b"\0"):
        with pytest.raises(FrameError, match="expected 24 bytes"):
            parse_request_head(data)
    for data in (b"", reply[:-1], reply + b"\0"):
        with pytest.raises(FrameError, match="expected 16 bytes"):
            parse_reply(data, expected_bytes=1)
    for data in (b"", bytes(7), bytes(9)):
        with pytest.raises(FrameError, match="1 runs need 8 bytes"):
            parse_runs(data, num_runs=1, num_units=8)


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(FrameError, match="hello: expected"):
        parse_hello(b"STKV\x02\0\0\0" + KEY)


def test_random_and_mutated_messages_only_ever_raise_frame_errors() -> None:
    counts = fuzz(num_cases=20_000, seed=5)
    assert counts.num_refused + counts.num_parsed == 20_000
    assert counts.num_parsed > 1_000  # mutations reach behind the first check


@given(st.lists(st.integers(0, 9), max_size=30))
def test_runs_name_the_same_units_in_the_same_order(unit_ids: list[int]) -> None:
    runs = to_runs(unit_ids)
    assert [run.first + offset for run in runs for offset in range(run.num_units)] == unit_ids
    assert all(first.first + first.num_units != second.first for first, second in pairwise(runs))


def test_views_of_runs_are_the_memory_itself() -> None:
    memory = bytearray(range(40))
    views = to_views(memoryview(memory), [Run(1, 2), Run(7, 1)], unit_bytes=5)
    assert [bytes(view) for view in views] == [bytes(range(5, 15)), bytes(range(35, 40))]
    memory[5] = 255
    assert views[0][0] == 255
