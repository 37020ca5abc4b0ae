"""Verification: what passes, what does not, and that nothing else makes a VerifiedBlock."""

from dataclasses import replace

import pytest

from kvtransfer.checksum import head_checksums
from kvtransfer.layout import BlockId, KVGroup
from kvtransfer.manifest import BlockEntry, VerifiedBlock, verify
from staffetta.errors import Code, CorruptBlockError

GROUP = KVGroup("full", num_layers=1, num_kv_heads=2, head_dim=4, block_size=4, dtype="bfloat16")
CHAIN_HASH = bytes(range(16))


def make_page() -> bytearray:
    return bytearray(range(GROUP.block_bytes))


def make_entry(**changes: object) -> BlockEntry:
    checksums = head_checksums(memoryview(make_page()), GROUP)
    entry = BlockEntry(BlockId(9), 2, 4, 17, CHAIN_HASH, checksums)
    return replace(entry, **changes)  # type: ignore[arg-type]


def check(entry: BlockEntry, page: bytes | bytearray, *, num_tokens: int = 4) -> VerifiedBlock:
    return verify(
        entry,
        memoryview(page),
        GROUP,
        block_id=BlockId(5),
        expected_index=2,
        expected_num_tokens=num_tokens,
        expected_chain_hash=CHAIN_HASH if num_tokens == GROUP.block_size else None,
    )


def test_a_block_that_is_what_was_announced_is_verified() -> None:
    entry = make_entry()
    verified = check(entry, make_page())
    assert (verified.block_id, verified.entry) == (5, entry)


def test_a_last_block_that_is_not_full_has_no_chain_hash() -> None:
    entry = make_entry(num_tokens=3, chain_hash=b"")
    assert check(entry, make_page(), num_tokens=3).entry == entry
    with pytest.raises(CorruptBlockError, match="chain hash expected , got 0001"):
        check(make_entry(num_tokens=3), make_page(), num_tokens=3)


def test_a_page_longer_than_the_block_is_verified_by_its_beginning() -> None:
    assert check(make_entry(), make_page() + b"tail").block_id == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_index": 3}, "block 2: index expected 2, got 3"),
        ({"num_tokens": 3}, "block 2: token count expected 4, got 3"),
        ({"chain_hash": b"\xff" * 16}, f"block 2: chain hash expected {CHAIN_HASH.hex()}, got {'ff' * 16}"),
        ({"chain_hash": b""}, f"block 2: chain hash expected {CHAIN_HASH.hex()}, got "),
        ({"head_checksums": (1,)}, "block 2: number of head checksums expected 2, got 1"),
        ({"head_checksums": ()}, "block 2: number of head checksums expected 2, got 0"),
    ],
)
def test_a_manifest_that_does_not_fit_the_place_is_refused_with_both_values(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CorruptBlockError) as caught:
        check(make_entry(**changes), make_page())
    assert caught.value.message == message


def test_a_page_that_is_too_short_is_refused() -> None:
    with pytest.raises(CorruptBlockError, match=f"length in bytes expected {GROUP.block_bytes}, got 63"):
        check(make_entry(), make_page()[:63])


def test_one_flipped_bit_is_refused_naming_block_head_and_both_checksums() -> None:
    page = make_page()
    page[GROUP.head_span_bytes + 3] ^= 0x10
    announced, actual = make_entry().head_checksums[1], head_checksums(memoryview(page), GROUP)[1]
    with pytest.raises(CorruptBlockError) as caught:
        check(make_entry(), page)
    assert caught.value.message == (
        f"block 2, KV head 1: checksum announced {announced:016x}, bytes have {actual:016x}"
    )
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "CORRUPT_BLOCK")
    assert caught.value.is_retryable


def test_nothing_but_verify_makes_a_verified_block() -> None:
    with pytest.raises(TypeError, match="from nowhere else"):
        VerifiedBlock(BlockId(5), make_entry(), proof=object())
    with pytest.raises(TypeError, match="from nowhere else"):
        replace(check(make_entry(), make_page()), block_id=BlockId(6), proof=None)
