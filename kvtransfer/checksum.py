"""One checksum per (block, KV head): xxh3-64 over the tile hashes of the head's span.

    span   | tile 0: 16 KiB | tile 1 | … | last tile, maybe shorter |
    hashes | xxh3-64, 8 bytes little-endian, of each tile, in order |   → checksum = xxh3-64(hashes)

Tiles make the checksum parallel: a GPU hashes them independently, one group of threads each. A head's span is
contiguous (head-major pages), so whoever reads only some heads can verify exactly those. Against accidents, not
against forgers.
"""

from typing import Final

import xxhash

from kvtransfer.layout import KVGroup

TILE_BYTES: Final = 16 * 1024


def span_checksum(span: memoryview) -> int:
    """The checksum, an unsigned 64-bit number, of one head's `span` (contiguous bytes, any length)."""
    tiles = (span[start : start + TILE_BYTES] for start in range(0, len(span), TILE_BYTES))
    hashes = b"".join(xxhash.xxh3_64_intdigest(tile).to_bytes(8, "little") for tile in tiles)
    return xxhash.xxh3_64_intdigest(hashes)


def head_checksums(page: memoryview, group: KVGroup) -> tuple[int, ...]:
    """Checksums of all KV heads, in order, of the block of `group` at the start of `page`.

    Raises ValueError when the page is too short to hold the block.
    """
    if len(page) < group.block_bytes:
        raise ValueError(f"a page of {len(page)} bytes cannot hold a block of {group.block_bytes} bytes")
    span = group.head_span_bytes
    return tuple(span_checksum(page[head * span : (head + 1) * span]) for head in range(group.num_kv_heads))
