"""Checksums: against values worked out by hand from the definition, and against every single bit."""

import struct

import pytest
import xxhash

from kvtransfer.checksum import TILE_BYTES, head_checksums, span_checksum
from kvtransfer.layout import KVGroup

GROUP = KVGroup("full", num_layers=2, num_kv_heads=3, head_dim=4, block_size=4, dtype="float32")


def test_the_checksum_of_one_tile_is_the_hash_of_its_hash() -> None:
    span = b"staffetta"
    expected = xxhash.xxh3_64_intdigest(struct.pack("<Q", xxhash.xxh3_64_intdigest(span)))
    assert span_checksum(memoryview(span)) == expected


def test_the_checksum_joins_tile_hashes_in_order_with_a_shorter_last_tile() -> None:
    tiles = [b"a" * TILE_BYTES, b"b" * TILE_BYTES, b"c" * 5]
    hashes = struct.pack("<3Q", *(xxhash.xxh3_64_intdigest(tile) for tile in tiles))
    assert span_checksum(memoryview(b"".join(tiles))) == xxhash.xxh3_64_intdigest(hashes)


def test_the_checksum_does_not_change_from_one_version_to_the_next() -> None:
    assert span_checksum(memoryview(b"")) == 0x2D06800538D394C2
    assert span_checksum(memoryview(bytes(range(256)) * 100)) == 0xC9F1B8426D667334


def test_each_head_has_the_checksum_of_its_own_span() -> None:
    page = bytes(range(256)) * 2
    span = GROUP.head_span_bytes
    assert GROUP.block_bytes == 3 * span == 768
    page = (page * 2)[: GROUP.block_bytes]
    expected = tuple(span_checksum(memoryview(page)[head * span : (head + 1) * span]) for head in range(3))
    assert head_checksums(memoryview(page), GROUP) == expected


def test_bytes_of_the_page_behind_the_block_do_not_count() -> None:
    block = bytes(GROUP.block_bytes)
    assert head_checksums(memoryview(block + b"tail"), GROUP) == head_checksums(memoryview(block), GROUP)


def test_a_page_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="a page of 767 bytes cannot hold a block of 768 bytes"):
        head_checksums(memoryview(bytes(767)), GROUP)


def test_every_single_flipped_bit_changes_exactly_the_checksum_of_its_head() -> None:
    page = bytearray(GROUP.block_bytes)
    clean = head_checksums(memoryview(page), GROUP)
    for bit in range(len(page) * 8):
        page[bit // 8] ^= 1 << bit % 8
        flipped = head_checksums(memoryview(page), GROUP)
        head = bit // 8 // GROUP.head_span_bytes
        assert [index for index in range(3) if flipped[index] != clean[index]] == [head]
        page[bit // 8] ^= 1 << bit % 8
