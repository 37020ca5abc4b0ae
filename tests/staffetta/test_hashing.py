"""The block-hash chain: equal beginnings share hashes, and nothing else does."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from staffetta.hashing import HASH_BYTES, MAX_KEY_BYTES, BlockHash, BlockHasher, short_hash

KEY = bytes(range(32))
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=70)
salts = st.binary(max_size=64)
adapters = st.text(max_size=20)


def make_hasher(*, key: bytes = KEY, block_size: int = 4) -> BlockHasher:
    return BlockHasher(key, block_size=block_size)


def test_a_chain_is_keyed_blake2b_over_parent_and_tokens() -> None:
    def digest(message: bytes) -> bytes:
        return hashlib.blake2b(message, key=KEY, digest_size=16).digest()

    root = digest(struct.pack("<II", 2, 1) + b"\x07\x08" + b"a")
    first = digest(root + struct.pack("<4I", 1, 2, 3, 4))
    second = digest(first + struct.pack("<4I", 5, 6, 7, 2**32 - 1))
    assert make_hasher().chain([1, 2, 3, 4, 5, 6, 7, 2**32 - 1, 9], salt=b"\x07\x08", adapter="a") == [first, second]


@given(tokens, st.integers(1, 17))
def test_only_full_blocks_have_hashes(token_ids: list[int], block_size: int) -> None:
    chain = make_hasher(block_size=block_size).chain(token_ids)
    assert len(chain) == len(token_ids) // block_size
    assert {len(block_hash) for block_hash in chain} <= {HASH_BYTES}


@given(tokens, tokens)
def test_chains_are_equal_exactly_as_far_as_the_blocks_are(left: list[int], right: list[int]) -> None:
    hasher = make_hasher()
    num_equal = 0
    for start in range(0, min(len(left), len(right)) - 3, 4):
        if left[start : start + 4] != right[start : start + 4]:
            break
        num_equal += 1
    left_chain, right_chain = hasher.chain(left), hasher.chain(right)
    assert left_chain[:num_equal] == right_chain[:num_equal]
    assert set(left_chain[num_equal:]).isdisjoint(right_chain[num_equal:])


@given(tokens, st.integers(0, 70))
def test_the_chain_of_a_prefix_is_a_prefix_of_the_chain(token_ids: list[int], length: int) -> None:
    hasher = make_hasher()
    prefix = hasher.chain(token_ids[:length])
    assert hasher.chain(token_ids)[: len(prefix)] == prefix


@given(tokens, salts, adapters)
def test_a_chain_is_extended_block_by_block(token_ids: list[int], salt: bytes, adapter: str) -> None:
    hasher = make_hasher()
    parent = hasher.root(salt=salt, adapter=adapter)
    hashes: list[BlockHash] = []
    for start in range(0, len(token_ids) - 3, 4):
        parent = hasher.extend(parent, token_ids[start : start + 4])
        hashes.append(parent)
    assert hasher.chain(token_ids, salt=salt, adapter=adapter) == hashes


@given(salts, adapters, salts, adapters)
def test_different_salts_or_adapters_have_different_roots(
    salt: bytes, adapter: str, other_salt: bytes, other_adapter: str
) -> None:
    hasher = make_hasher()
    is_same = (salt, adapter) == (other_salt, other_adapter)
    is_equal = hasher.root(salt=salt, adapter=adapter) == hasher.root(salt=other_salt, adapter=other_adapter)
    assert is_equal is is_same


def test_bytes_do_not_move_between_salt_and_adapter() -> None:
    hasher = make_hasher()
    roots = {hasher.root(salt=b"ab", adapter=""), hasher.root(salt=b"a", adapter="b"), hasher.root(adapter="ab")}
    assert len(roots) == 3


@given(st.binary(min_size=16, max_size=64), st.binary(min_size=16, max_size=64))
def test_another_key_makes_another_chain(key: bytes, other: bytes) -> None:
    # BLAKE2 pads keys with zeros but counts their bytes, so that a padded key is another key.
    chains = [make_hasher(key=each).chain([1, 2, 3, 4]) for each in (key, other)]
    assert (chains[0] == chains[1]) is (key == other)


def test_a_padded_key_is_another_key() -> None:
    assert make_hasher(key=b"k" * 16).root() != make_hasher(key=b"k" * 16 + b"\0").root()


def test_another_block_size_makes_another_chain() -> None:
    eight = list(range(8))
    assert set(make_hasher(block_size=4).chain(eight)).isdisjoint(make_hasher(block_size=8).chain(eight))


@pytest.mark.parametrize("num_bytes", [0, 15, MAX_KEY_BYTES + 1])
def test_a_key_of_the_wrong_size_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"cluster key has {num_bytes} bytes, needs 16 to 64"):
        BlockHasher(bytes(num_bytes), block_size=16)


@pytest.mark.parametrize("num_bytes", [16, MAX_KEY_BYTES])
def test_keys_of_the_limits_are_taken(num_bytes: int) -> None:
    assert BlockHasher(bytes(num_bytes), block_size=16).block_size == 16


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        BlockHasher(KEY, block_size=0)


@pytest.mark.parametrize("token_ids", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -1], [1, 2, 3, 2**32]])
def test_a_block_that_is_not_one_is_refused(token_ids: list[int]) -> None:
    hasher = make_hasher()
    with pytest.raises(struct.error):
        hasher.extend(hasher.root(), token_ids)


def test_a_short_hash_is_the_first_eight_bytes() -> None:
    assert short_hash(BlockHash(b"\x01" + bytes(6) + b"\x80" + b"\xff" * 8)) == 1 + (0x80 << 56)
