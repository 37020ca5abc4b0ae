"""Which blocks a prompt finds, and what the cache tells of itself."""

import pytest

from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import CacheEvents, DisabledPrefixCache, PrefixCache
from kvtransfer.layout import BlockId
from staffetta.hashing import BlockHash, short_hash
from tests.engine.making import make_hasher

CHAIN = make_hasher().chain(range(16))
SHORT = tuple(map(short_hash, CHAIN))


def make_cache(
    num_blocks: int = 4, *, chain: list[BlockHash] | None = None
) -> tuple[BlockPool, PrefixCache, BlockLease]:
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool)
    lease = BlockLease(pool)
    for block_hash in chain or []:
        lease.extend(1)
        cache.publish(lease.table[-1], block_hash)
    return pool, cache, lease


def test_a_chain_matches_up_to_its_first_unknown_block() -> None:
    _, cache, _ = make_cache(chain=[CHAIN[0], CHAIN[1], CHAIN[3]])
    assert cache.match(CHAIN) == (0, 1)
    assert cache.match(CHAIN[1:]) == (1,)
    assert cache.match(make_hasher().chain(range(1, 17))) == ()


def test_matching_takes_no_reference_and_changes_no_order_of_reuse() -> None:
    pool, cache, lease = make_cache(3, chain=CHAIN[:3])
    lease.release()
    cache.match(CHAIN)
    assert pool.counts().cached == 3
    lease.extend(3)
    assert tuple(lease.table) == (2, 1, 0)


def test_a_second_block_with_the_same_content_stays_unpublished() -> None:
    pool, cache, lease = make_cache(chain=CHAIN[:1])
    lease.extend(1)
    assert cache.publish(lease.table[1], CHAIN[0]) is False
    assert cache.match(CHAIN) == (0,)
    lease.release()
    assert (pool.counts().cached, pool.counts().free) == (1, 3)


def test_an_evicted_block_is_found_no_more() -> None:
    _, cache, lease = make_cache(2, chain=CHAIN[:2])
    lease.release()
    lease.extend(1)
    assert cache.match(CHAIN) == (0,)
    cache.check_integrity()


def test_events_are_the_net_change_since_the_last_drain() -> None:
    _, cache, lease = make_cache(2, chain=CHAIN[:2])
    assert cache.drain_events() == CacheEvents(stored=SHORT[:2], removed=())
    assert cache.drain_events() == CacheEvents(stored=(), removed=())
    lease.release()
    lease.extend(2)
    cache.publish(lease.table[0], CHAIN[1])  # back again before anybody heard that it was gone
    cache.publish(lease.table[1], CHAIN[2])
    assert cache.drain_events() == CacheEvents(stored=SHORT[2:3], removed=SHORT[:1])
    assert cache.snapshot() == CacheEvents(stored=SHORT[1:3], removed=())


def test_what_is_stored_and_removed_between_two_drains_is_never_told() -> None:
    _, cache, lease = make_cache(1, chain=CHAIN[:1])
    lease.release()
    lease.extend(1)
    assert cache.drain_events() == CacheEvents(stored=(), removed=())


def test_a_disabled_cache_finds_and_publishes_nothing() -> None:
    pool = BlockPool(1)
    cache = DisabledPrefixCache(pool)
    with BlockLease(pool) as lease:
        lease.extend(1)
        assert cache.publish(BlockId(0), CHAIN[0]) is False
        assert cache.match(CHAIN) == ()
    assert (pool.counts().free, cache.drain_events(), cache.snapshot()) == (1, CacheEvents((), ()), CacheEvents((), ()))


def test_the_integrity_check_notices_hashes_and_blocks_that_differ() -> None:
    pool, cache, lease = make_cache(chain=CHAIN[:1])
    lease.extend(1)
    pool.publish(lease.table[1])
    with pytest.raises(IntegrityError, match=r"blocks \[1\] are published on one side only"):
        cache.check_integrity()
    cache._block_of[CHAIN[1]] = BlockId(0)
    with pytest.raises(IntegrityError, match="names block 0, which has another hash"):
        cache.check_integrity()
