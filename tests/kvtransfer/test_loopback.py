"""The shipped fake: its faults, and that what they do to bytes does not get past verification."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtransfer.checksum import head_checksums
from kvtransfer.layout import BlockId, KVGroup
from kvtransfer.loopback import LoopbackExporter, LoopbackFaults
from kvtransfer.manifest import BlockEntry, VerifiedBlock, verify
from kvtransfer.transport import BlockRead, open_reader
from staffetta.errors import CorruptBlockError, TransportError
from tests.kvtransfer.pair import PAGE_BYTES, Pair, make_pair

GROUP = KVGroup("full", num_layers=1, num_kv_heads=3, head_dim=25, block_size=5, dtype="float32")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with make_pair("loopback", tmp_path) as made:
        yield made


def faults_of(pair: Pair) -> LoopbackFaults:
    assert isinstance(pair.exporter, LoopbackExporter)
    return pair.exporter.faults


def verify_block_zero(pair: Pair, remote_block_id: int) -> VerifiedBlock:
    """Verifies local block 0 as what the remote block was announced to be."""
    assert GROUP.block_bytes == PAGE_BYTES
    remote_id, local_id = BlockId(remote_block_id), BlockId(0)
    checksums = head_checksums(pair.remote.block(remote_id), GROUP)
    entry = BlockEntry(remote_id, 0, 5, 1, b"hash", checksums)
    return verify(
        entry,
        pair.local.block(local_id),
        GROUP,
        block_id=local_id,
        expected_index=0,
        expected_num_tokens=5,
        expected_chain_hash=b"hash",
    )


def test_a_read_happens_before_read_returns_unless_held(pair: Pair) -> None:
    future = pair.reader.read(pair.ticket, [BlockRead(4, 0)])
    assert future.done()
    assert verify_block_zero(pair, 4).block_id == 0


def test_held_reads_wait_and_happen_in_order_at_release(pair: Pair) -> None:
    faults_of(pair).hold()
    futures = [pair.reader.read(pair.ticket, [BlockRead(remote, 0)]) for remote in (1, 2)]
    assert [future.done() for future in futures] == [False, False]
    assert not pair.local_pages.any()
    faults_of(pair).release()
    assert [future.result(0) for future in futures] == [PAGE_BYTES, PAGE_BYTES]
    assert np.array_equal(pair.local_pages[0], pair.remote_pages[2])
    assert pair.reader.read(pair.ticket, [BlockRead(3, 0)]).done()


def test_closing_resolves_held_reads_which_then_never_happen(pair: Pair) -> None:
    other_offer = pair.exporter.offer()
    other_ticket = pair.tickets.issue("other", {other_offer.session_key}, [2], lease_s=600)
    other = open_reader(other_offer, memory=pair.local)
    faults_of(pair).hold()
    future = pair.reader.read(pair.ticket, [BlockRead(1, 0)])
    other_future = other.read(other_ticket, [BlockRead(2, 1)])
    pair.reader.close()
    assert str(future.exception(0)) == "the transport was closed"
    assert not other_future.done()
    faults_of(pair).release()
    assert not pair.local_pages[0].any()
    assert other_future.result(0) == PAGE_BYTES


def test_a_failing_read_writes_half_of_its_blocks_and_the_next_one_works(pair: Pair) -> None:
    faults_of(pair).num_failures = 1
    reads = [BlockRead(block, block) for block in range(4)]
    with pytest.raises(TransportError, match="the connection to the peer broke"):
        pair.reader.read(pair.ticket, reads).result(0)
    assert [bool(page.any()) for page in pair.local_pages[:5]] == [True, True, False, False, False]
    assert pair.reader.read(pair.ticket, reads).result(0) == 4 * PAGE_BYTES


@pytest.mark.parametrize("bit", [0, 7, 8, 8000, PAGE_BYTES * 8 - 1])
def test_a_flipped_bit_is_caught_by_verification(pair: Pair, bit: int) -> None:
    faults_of(pair).flips.append((0, bit))
    assert pair.reader.read(pair.ticket, [BlockRead(4, 0)]).result(0) == PAGE_BYTES
    with pytest.raises(CorruptBlockError, match=f"block 0, KV head {bit // 8 // GROUP.head_span_bytes}: checksum"):
        verify_block_zero(pair, 4)
    assert pair.reader.read(pair.ticket, [BlockRead(4, 0)]).result(0) == PAGE_BYTES
    assert verify_block_zero(pair, 4).block_id == 0


def test_a_block_reused_by_its_owner_after_it_was_announced_is_caught_by_verification(pair: Pair) -> None:
    announced = head_checksums(pair.remote.block(BlockId(4)), GROUP)
    pair.remote.block(BlockId(4))[2500:2504] = b"late"
    assert pair.reader.read(pair.ticket, [BlockRead(4, 0)]).result(0) == PAGE_BYTES
    arrived = head_checksums(pair.local.block(BlockId(0)), GROUP)
    assert [first == second for first, second in zip(announced, arrived, strict=True)] == [True, True, False]


def test_tickets_are_enforced_as_on_a_real_transport(pair: Pair) -> None:
    ticket = pair.tickets.issue("request", {pair.offer.session_key}, [1], lease_s=600)
    with pytest.raises(TransportError, match="ticket OTHER_BLOCKS"):
        pair.reader.read(ticket, [BlockRead(2, 0)]).result(0)
    pair.tickets.revoke(ticket)
    with pytest.raises(TransportError, match="ticket UNKNOWN"):
        pair.reader.read(ticket, [BlockRead(1, 0)]).result(0)
    assert not pair.local_pages.any()


def test_a_withdrawn_session_reads_nothing_more_not_even_what_was_held(pair: Pair) -> None:
    faults_of(pair).hold()
    future = pair.reader.read(pair.ticket, [BlockRead(1, 0)])
    pair.exporter.withdraw(pair.offer.session_key)
    faults_of(pair).release()
    assert str(future.exception(0)) == "the connection to the peer broke"
    assert not pair.local_pages.any()
