"""What every transport promises, checked on each of them alike."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtransfer.memory import PROBE_BYTES, PoolMemory
from kvtransfer.selftest import NUM_ROUNDS, run_selftest
from kvtransfer.ticket import TicketBook
from kvtransfer.transport import (
    BlockRead,
    SelfTest,
    TransportOffer,
    choose,
    export,
    merge_runs,
    open_reader,
)
from staffetta.errors import TransportError
from tests.kvtransfer.pair import NUM_LOCAL_BLOCKS, NUM_REMOTE_BLOCKS, PAGE_BYTES, Pair, make_exporter, make_pair

DEADLINE_S = 20.0  # never reached unless something hangs


@pytest.fixture(params=["shm", "tcp", "loopback"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with make_pair(request.param, tmp_path) as made:
        yield made


def test_a_read_copies_exactly_the_blocks_named(pair: Pair) -> None:
    reads = [BlockRead(7, 2), BlockRead(8, 3), BlockRead(0, 5), BlockRead(NUM_REMOTE_BLOCKS - 1, NUM_LOCAL_BLOCKS - 1)]
    assert pair.reader.read(pair.ticket, reads).result(DEADLINE_S) == 4 * PAGE_BYTES
    expected = np.zeros((NUM_LOCAL_BLOCKS, PAGE_BYTES), dtype=np.uint8)
    for read in reads:
        expected[read.local_block_id] = pair.remote_pages[read.remote_block_id]
    assert np.array_equal(pair.local_pages, expected)


def test_a_read_of_a_whole_pool_in_any_order_arrives(pair: Pair) -> None:
    order = np.random.default_rng(1).permutation(NUM_LOCAL_BLOCKS)
    reads = [BlockRead(int(remote), local) for local, remote in enumerate(order)]
    assert pair.reader.read(pair.ticket, reads).result(DEADLINE_S) == NUM_LOCAL_BLOCKS * PAGE_BYTES
    assert np.array_equal(pair.local_pages, pair.remote_pages[order])


def test_many_reads_at_once_each_bring_their_own_blocks(pair: Pair) -> None:
    futures = [
        pair.reader.read(pair.ticket, [BlockRead(3 * local + offset, 3 * local + offset) for offset in range(3)])
        for local in range(200)
    ]
    assert [future.result(DEADLINE_S) for future in futures] == [3 * PAGE_BYTES] * 200
    assert np.array_equal(pair.local_pages[:600], pair.remote_pages[:600])


def test_reading_no_blocks_ends_at_once_with_zero_bytes(pair: Pair) -> None:
    future = pair.reader.read(pair.ticket, [])
    assert future.done()
    assert future.result() == 0


def test_the_same_remote_block_may_be_read_twice_in_one_read(pair: Pair) -> None:
    assert pair.reader.read(pair.ticket, [BlockRead(5, 0), BlockRead(5, 1)]).result(DEADLINE_S) == 2 * PAGE_BYTES
    assert np.array_equal(pair.local_pages[:2], pair.remote_pages[[5, 5]])


@pytest.mark.parametrize("local_block_ids", [(0, 0), (-1,), (NUM_LOCAL_BLOCKS,)])
def test_local_blocks_that_cannot_be_written_are_the_callers_mistake(
    pair: Pair, local_block_ids: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"named twice|not all in our pool"):
        pair.reader.read(pair.ticket, [BlockRead(0, block_id) for block_id in local_block_ids])


@pytest.mark.parametrize("remote_block_id", [-1, NUM_REMOTE_BLOCKS, 2**32])
def test_remote_blocks_outside_the_peers_pool_fail_the_read_and_nothing_else(pair: Pair, remote_block_id: int) -> None:
    with pytest.raises(TransportError, match=f"block {remote_block_id} is not in the peer's pool of 900"):
        pair.reader.read(pair.ticket, [BlockRead(remote_block_id, 0)]).result(DEADLINE_S)
    assert pair.reader.read(pair.ticket, [BlockRead(0, 0)]).result(DEADLINE_S) == PAGE_BYTES


def test_a_read_cannot_be_cancelled(pair: Pair) -> None:
    future = pair.reader.read(pair.ticket, [BlockRead(0, 0)])
    assert not future.cancel()
    assert future.result(DEADLINE_S) == PAGE_BYTES


def test_reading_after_close_fails_and_closing_twice_is_harmless(pair: Pair) -> None:
    pair.reader.close()
    pair.reader.close()
    with pytest.raises(TransportError, match="the transport was closed"):
        pair.reader.read(pair.ticket, [BlockRead(0, 0)]).result(DEADLINE_S)
    assert not pair.local_pages.any()


def test_a_read_may_close_the_reader_from_its_callback(pair: Pair) -> None:
    is_closed = threading.Event()

    def close(_: "Future[int]") -> None:
        pair.reader.close()
        is_closed.set()

    pair.reader.read(pair.ticket, [BlockRead(0, 0)]).add_done_callback(close)
    assert is_closed.wait(DEADLINE_S)
    with pytest.raises(TransportError):
        pair.reader.read(pair.ticket, [BlockRead(0, 0)]).result(DEADLINE_S)


def test_every_future_has_resolved_when_close_returns(pair: Pair) -> None:
    reads = [BlockRead(block, block) for block in range(NUM_LOCAL_BLOCKS)]
    futures = [pair.reader.read(pair.ticket, reads) for _ in range(20)]
    pair.reader.close()
    assert all(future.done() for future in futures)
    local = pair.local_pages.copy()
    assert {type(future.exception()) for future in futures} <= {type(None), TransportError}
    assert np.array_equal(local, pair.local_pages)


def test_the_self_test_measures_a_rate_over_verified_bytes(pair: Pair) -> None:
    measured = pair.reader.measure()
    assert (measured.transport, measured.num_bytes) == (pair.reader.transport, PROBE_BYTES * NUM_ROUNDS)
    assert measured.bytes_per_s > 0
    assert not pair.local_pages.any()


def test_a_withdrawn_offer_opens_nothing_and_withdrawing_twice_is_harmless(pair: Pair) -> None:
    other = pair.exporter.offer()
    pair.exporter.withdraw(other.session_key)
    pair.exporter.withdraw(other.session_key)
    with pytest.raises(TransportError):
        open_reader(other, memory=pair.local)
    assert pair.reader.read(pair.ticket, [BlockRead(0, 0)]).result(DEADLINE_S) == PAGE_BYTES


def test_a_wrong_session_key_opens_nothing(pair: Pair) -> None:
    with pytest.raises(TransportError):
        open_reader(replace(pair.offer, session_key=bytes(32)), memory=pair.local)


def test_every_offer_has_its_own_session_key(pair: Pair) -> None:
    keys = {pair.exporter.offer().session_key for _ in range(100)} | {pair.offer.session_key}
    assert len(keys) == 101
    assert {len(key) for key in keys} == {32}


def test_pools_with_pages_of_different_size_are_not_connected(pair: Pair) -> None:
    other = PoolMemory(4, PAGE_BYTES + 1)
    with pytest.raises(TransportError):
        open_reader(pair.exporter.offer(), memory=other)
    other.close()


def test_a_closed_exporter_cannot_be_reached(pair: Pair) -> None:
    offer = pair.exporter.offer()
    pair.exporter.close()
    pair.exporter.close()
    with pytest.raises(TransportError):
        open_reader(offer, memory=pair.local)


@pytest.mark.parametrize("transport", ["shm", "tcp", "loopback"])
def test_fifty_sessions_leave_no_thread_and_no_descriptor_behind(transport: str, tmp_path: Path) -> None:
    def run_sessions(count: int) -> None:
        with make_pair(transport, tmp_path) as pair:
            for _ in range(count):
                offer = pair.exporter.offer()
                reader = open_reader(offer, memory=pair.local)
                ticket = pair.tickets.issue("request", {offer.session_key}, [1], lease_s=10)
                assert reader.read(ticket, [BlockRead(1, 1)]).result(DEADLINE_S) == PAGE_BYTES
                reader.close()
                pair.exporter.withdraw(offer.session_key)
                pair.tickets.revoke(ticket)

    run_sessions(1)
    process = psutil.Process()
    num_descriptors, num_threads = process.num_fds(), threading.active_count()
    run_sessions(50)
    assert (process.num_fds(), threading.active_count()) == (num_descriptors, num_threads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transport", ["shm", "tcp", "loopback"])
def test_fifty_exporters_leave_no_thread_and_no_descriptor_behind(transport: str, tmp_path: Path) -> None:
    memory, tickets = PoolMemory(2, 64), TicketBook()
    make_exporter(transport, memory, tickets, tmp_path).close()
    process = psutil.Process()
    num_descriptors, num_threads = process.num_fds(), threading.active_count()
    for _ in range(50):
        make_exporter(transport, memory, tickets, tmp_path).close()
    assert (process.num_fds(), threading.active_count()) == (num_descriptors, num_threads)
    memory.close()


def test_a_transport_that_does_not_exist_is_refused_on_both_sides(tmp_path: Path) -> None:
    memory = PoolMemory(1, 64)
    with pytest.raises(ValueError, match="'pigeon' is not a transport; there are shm, tcp and loopback"):
        make_exporter("pigeon", memory, TicketBook(), tmp_path)
    with pytest.raises(TransportError, match="the peer offers transport 'pigeon', which this worker does not have"):
        open_reader(TransportOffer("pigeon", "", bytes(32), 1), memory=memory)
    memory.close()


def test_the_fastest_measurement_is_chosen_and_of_equals_the_first() -> None:
    slow, fast, equal = SelfTest("tcp", 2e9, 1), SelfTest("shm", 5e9, 1), SelfTest("loopback", 5e9, 1)
    assert choose([slow, fast, equal]) is fast
    assert choose([equal, fast]) is equal
    with pytest.raises(ValueError, match="nothing to choose from"):
        choose([])


def test_a_self_test_that_brings_wrong_bytes_or_none_fails() -> None:
    memory = PoolMemory(1, 64)

    def read_wrong(buffer: memoryview) -> None:
        buffer[:] = memory.probe
        buffer[-1] ^= 1

    for read_probe in (read_wrong, lambda buffer: None):
        with pytest.raises(TransportError, match="transport tcp changed bytes"):
            run_selftest("tcp", read_probe, expected=memory.probe)
    memory.close()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_merged_runs_name_the_same_blocks_in_the_same_order(pairs: list[tuple[int, int]]) -> None:
    reads = [BlockRead(remote, local) for remote, local in pairs]
    runs = merge_runs(reads)
    spelled_out = [BlockRead(remote + i, local + i) for remote, local, count in runs for i in range(count)]
    assert spelled_out == reads
    assert all((first[0] + first[2], first[1] + first[2]) != second[:2] for first, second in pairwise(runs))


def test_a_setting_that_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    memory, tickets = PoolMemory(1, 64), TicketBook()
    with pytest.raises(ValueError, match="'localhost' is not host:port"):
        export("tcp", memory, tickets=tickets, shm_dir=tmp_path, listen="localhost", advertise="")
    with pytest.raises(ValueError, match="set transfer_advertise to a host:port that they can"):
        export("tcp", memory, tickets=tickets, shm_dir=tmp_path, listen="0.0.0.0:0", advertise="")
    with pytest.raises(ValueError, match=r"would have 1\d\d bytes and may have 107: set shm_dir to a path"):
        export("shm", memory, tickets=tickets, shm_dir=tmp_path / ("d" * 80), listen="", advertise="")
    memory.close()
