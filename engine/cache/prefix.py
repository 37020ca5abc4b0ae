"""Finds blocks that already hold the beginning of a prompt, by their hash in the chain. Engine thread only.

A block is published once, when it is full and its KV final. Each hash has one canonical block: a second block with the
same content stays unpublished and is simply freed. Nobody writes into a published block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.cache.pool import BlockPool, IntegrityError
from kvtransfer.layout import BlockId
from staffetta.hashing import BlockHash, short_hash


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """What entered and what left the prefix cache, as short hashes. A net change: the order does not matter."""

    stored: tuple[int, ...]
    removed: tuple[int, ...]


class PrefixCache:
    """The published blocks of one pool, held and cached ones alike."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        # Net change since the last drain, bounded by the pool: what is stored and removed in between cancels out.
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}
        pool.listen(self._forget)

    def match(self, chain: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        """Blocks that hold the longest known beginning of `chain`. Takes no reference and changes no order of reuse."""
        block_ids: list[BlockId] = []
        for block_hash in chain:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return tuple(block_ids)

    def publish(self, block_id: BlockId, block_hash: BlockHash) -> bool:
        """Makes a held, full, final block findable. Returns whether it became the canonical block of its hash."""
        if block_hash in self._block_of:
            return False
        self._pool.publish(block_id)
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None
        return True

    def drain_events(self) -> CacheEvents:
        """The net change since the last call."""
        events = CacheEvents(tuple(map(short_hash, self._stored)), tuple(map(short_hash, self._removed)))
        self._stored.clear()
        self._removed.clear()
        return events

    def snapshot(self) -> CacheEvents:
        """Everything published now. Applying a later `drain_events` on top of it is right: nothing is lost or added."""
        return CacheEvents(tuple(map(short_hash, self._block_of)), ())

    def check_integrity(self) -> None:
        """Raises IntegrityError unless hashes and published blocks correspond one to one."""
        for block_hash, block_id in self._block_of.items():
            if self._hash_of.get(block_id) != block_hash:
                raise IntegrityError(f"hash {block_hash.hex()} names block {block_id}, which has another hash")
        published = {
            BlockId(number) for number in range(self._pool.num_blocks) if self._pool.is_published(BlockId(number))
        }
        if published != self._hash_of.keys() or len(self._hash_of) != len(self._block_of):
            raise IntegrityError(f"blocks {sorted(published ^ self._hash_of.keys())} are published on one side only")

    def _forget(self, block_id: BlockId) -> None:
        block_hash = self._hash_of.pop(block_id)
        del self._block_of[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None


class DisabledPrefixCache(PrefixCache):
    """Finds nothing and publishes nothing: every prompt is computed from its first token."""

    def match(self, chain: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        return ()

    def publish(self, block_id: BlockId, block_hash: BlockHash) -> bool:
        return False
