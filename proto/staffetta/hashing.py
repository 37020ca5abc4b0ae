"""The block-hash chain: names a run of tokens together with everything before it.

Keyed BLAKE2b over (parent hash, token ids), rooted in (tenant salt, adapter). Whoever lacks the cluster key cannot make
two prompts collide, nor tell from a hash what it names.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES = 16
MAX_KEY_BYTES = 64


class BlockHasher:
    """Computes chains for one block size under one cluster key. Stateless after construction; any thread may use it."""

    def __init__(self, key: bytes, *, block_size: int) -> None:
        if not 16 <= len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"cluster key has {len(key)} bytes, needs 16 to {MAX_KEY_BYTES}")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, needs at least 1")
        self._key = key
        self._block_size = block_size
        self._pack = struct.Struct(f"<{block_size}I").pack

    @property
    def block_size(self) -> int:
        """Token positions in a block."""
        return self._block_size

    def root(self, *, salt: bytes = b"", adapter: str = "") -> BlockHash:
        """The parent of a sequence's first block. Sequences with different salts or adapters share nothing."""
        name = adapter.encode()
        return self._digest(struct.pack("<II", len(salt), len(name)) + salt + name)

    def extend(self, parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
        """The hash of the full block that holds `token_ids` ([block_size]) after `parent`."""
        return self._digest(parent + self._pack(*token_ids))

    def chain(self, token_ids: Sequence[int], *, salt: bytes = b"", adapter: str = "") -> list[BlockHash]:
        """Hashes of all full blocks of `token_ids`, first to last; a tail that fills no block has none."""
        hashes: list[BlockHash] = []
        parent = self.root(salt=salt, adapter=adapter)
        for start in range(0, len(token_ids) - self._block_size + 1, self._block_size):
            parent = self.extend(parent, token_ids[start : start + self._block_size])
            hashes.append(parent)
        return hashes

    def _digest(self, message: bytes) -> BlockHash:
        return BlockHash(hashlib.blake2b(message, key=self._key, digest_size=HASH_BYTES).digest())


def key_fingerprint(key: bytes) -> str:
    """Tells cluster keys apart, in hexadecimal, without telling them; peers compare it before they pair."""
    return hashlib.blake2b(b"staffetta cluster key", key=key, digest_size=8).hexdigest()


def short_hash(block_hash: BlockHash) -> int:
    """The first 8 bytes as an unsigned number: what cache events and the router's index carry."""
    return int.from_bytes(block_hash[:8], "little")
