"""Who owns which block, in exact ids, and under random operations."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.lease import BlockLease, BlockTable
from engine.cache.pool import BlockPool, BlockState, IntegrityError, PoolCounts
from kvtransfer.layout import BlockId


def make_lease(pool: BlockPool, num_blocks: int, *, num_published: int = 0) -> BlockLease:
    lease = BlockLease(pool)
    lease.extend(num_blocks)
    for block_id in lease.table.first(num_published):
        pool.publish(block_id)
    return lease


def test_blocks_are_taken_in_order_and_counted() -> None:
    pool = BlockPool(4)
    lease = make_lease(pool, 3)
    assert tuple(lease.table) == (0, 1, 2)
    assert pool.counts() == PoolCounts(total=4, free=1, held=3, cached=0, quarantined=0)


def test_unpublished_blocks_are_free_after_release_and_the_longest_free_is_taken_first() -> None:
    pool = BlockPool(4)
    make_lease(pool, 2).release()
    assert tuple(make_lease(pool, 4).table) == (2, 3, 1, 0)


def test_published_blocks_stay_cached_after_release() -> None:
    pool = BlockPool(4)
    make_lease(pool, 3, num_published=2).release()
    assert pool.counts() == PoolCounts(total=4, free=2, held=0, cached=2, quarantined=0)
    assert [pool.state(BlockId(i)) for i in range(3)] == [BlockState.CACHED, BlockState.CACHED, BlockState.FREE]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    make_lease(pool, 2, num_published=2).release()
    assert tuple(make_lease(pool, 3).table) == (2, 3, 1)


def test_freed_blocks_are_reused_tail_first() -> None:
    pool = BlockPool(3)
    make_lease(pool, 3, num_published=3).release()
    assert tuple(make_lease(pool, 3).table) == (2, 1, 0)


def test_cached_blocks_are_reused_least_recently_used_first() -> None:
    pool = BlockPool(4)
    first, second = make_lease(pool, 2, num_published=2), make_lease(pool, 2, num_published=2)
    first.release()
    second.release()
    hit = BlockLease(pool)
    hit.share((BlockId(1),))  # from the middle of the queue: 1, 0, 3, 2
    hit.release()
    assert tuple(make_lease(pool, 4).table) == (0, 3, 2, 1)


def test_who_listens_is_told_of_every_eviction() -> None:
    pool = BlockPool(3)
    evicted: list[BlockId] = []
    pool.listen(evicted.append)
    make_lease(pool, 2, num_published=2).release()
    make_lease(pool, 3)
    assert evicted == [1, 0]
    assert not pool.is_published(BlockId(0))


def test_a_shared_block_is_held_until_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    owner = make_lease(pool, 1, num_published=1)
    sharer = BlockLease(pool)
    sharer.share(owner.table.first(1))
    owner.release()
    assert (pool.state(BlockId(0)), pool.num_references(BlockId(0))) == (BlockState.HELD, 1)
    sharer.release()
    assert pool.state(BlockId(0)) is BlockState.CACHED


def test_the_generation_counts_allocations_not_shares() -> None:
    pool = BlockPool(1)
    lease = make_lease(pool, 1, num_published=1)
    assert pool.generation(BlockId(0)) == 1
    lease.release()
    with BlockLease(pool) as sharer:
        sharer.share((BlockId(0),))
        assert pool.generation(BlockId(0)) == 1
    make_lease(pool, 1)
    assert pool.generation(BlockId(0)) == 2


def test_quarantined_blocks_are_nobodys_until_their_key_is_released() -> None:
    pool = BlockPool(3)
    make_lease(pool, 2).quarantine(7)
    assert pool.counts() == PoolCounts(total=3, free=1, held=0, cached=0, quarantined=2)
    assert (pool.num_available, pool.quarantine_keys()) == (1, frozenset({7}))
    assert (pool.release_quarantine(8), pool.release_quarantine(7), pool.release_quarantine(7)) == (0, 2, 0)
    assert pool.counts().free == 3
    pool.check_integrity()


def test_a_block_that_is_shared_or_published_cannot_be_quarantined() -> None:
    pool = BlockPool(2)
    published, shared = make_lease(pool, 1, num_published=1), make_lease(pool, 1)
    BlockLease(pool).share(tuple(shared.table))
    for lease in (published, shared):
        with pytest.raises(IntegrityError, match="cannot quarantine"):
            lease.quarantine(1)


def test_misuse_is_refused_by_name() -> None:
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match="cannot release"):
        pool.release(BlockId(0))
    with pytest.raises(IntegrityError, match="cannot share"):
        pool.retain(BlockId(0))
    with pytest.raises(IntegrityError, match="cannot publish"):
        pool.publish(BlockId(0))
    with pytest.raises(IntegrityError, match="3 blocks wanted, 2 available"):
        pool.allocate(3)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockPool(0)
    assert pool.counts().free == 2


def test_a_lease_releases_once_however_often_it_is_told() -> None:
    pool = BlockPool(2)
    with make_lease(pool, 2) as lease:
        lease.release()
    lease.release()
    assert pool.counts().free == 2


def test_a_lease_is_released_when_its_block_raises() -> None:
    pool = BlockPool(2)
    with pytest.raises(RuntimeError, match="boom"), make_lease(pool, 2):
        raise RuntimeError("boom")
    assert pool.counts().free == 2


def test_splitting_moves_references_and_leaves_tables_read_before_as_they_were() -> None:
    pool = BlockPool(4)
    lease = make_lease(pool, 4)
    table = lease.table
    rest = lease.split(1)
    assert (tuple(lease.table), tuple(rest.table), tuple(table)) == ((0,), (1, 2, 3), (0, 1, 2, 3))
    rest.release()
    assert pool.counts().held == 1


def test_a_table_gives_the_same_tuple_while_it_has_not_grown() -> None:
    table = BlockTable((BlockId(3), BlockId(1)))
    assert table.first(2) is table.first(2)
    assert (table.first(1), table[1], len(table), list(table)) == ((3,), 1, 2, [3, 1])
    before = table.first(2)
    table.append((BlockId(5),))
    assert (before, table.first(3), repr(table)) == ((3, 1), (3, 1, 5), "BlockTable([3, 1, 5])")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_references", 0, "has 0 references"),
        ("state", BlockState.FREE, "is free by its record, held by its place"),
    ],
)
def test_the_integrity_check_names_a_broken_record(field: str, value: object, message: str) -> None:
    pool = BlockPool(2)
    make_lease(pool, 1)
    setattr(pool._blocks[0], field, value)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity()


def test_the_integrity_check_notices_a_broken_link_a_wrong_length_and_lost_content() -> None:
    for break_it, message in (
        (lambda pool: setattr(pool._blocks[2], "previous", None), "links back to"),
        (lambda pool: setattr(pool._free, "_length", 9), "the free queue counts 9 blocks"),
        (lambda pool: setattr(pool._blocks[2], "is_published", True), "published without content"),
        (lambda pool: pool._quarantined.setdefault(1, []).append(BlockId(2)), "in a second place"),
    ):
        pool = BlockPool(3)
        break_it(pool)
        with pytest.raises(IntegrityError, match=message):
            pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Random leases against a model that is a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.evicted: list[BlockId] = []
        self.pool.listen(self.evicted.append)
        self.leases: list[BlockLease] = []
        self.keys: list[int] = []

    @rule(num_blocks=st.integers(0, 3))
    def take(self, num_blocks: int) -> None:
        if num_blocks <= self.pool.num_available:
            self.leases.append(make_lease(self.pool, num_blocks))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        for block_id in data.draw(st.sampled_from(self.leases)).table:
            if not self.pool.is_published(block_id):
                self.pool.publish(block_id)

    @rule(number=st.integers(0, 5))
    def share(self, number: int) -> None:
        if self.pool.state(BlockId(number)) in (BlockState.HELD, BlockState.CACHED):
            self.leases.append(BlockLease(self.pool))
            self.leases[-1].share((BlockId(number),))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), is_split=st.booleans())
    def give_back(self, data: st.DataObject, is_split: bool) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        if is_split:
            lease.split(len(lease) // 2).release()
        else:
            lease.release()
            self.leases.remove(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        if all(self.pool.num_references(b) == 1 and not self.pool.is_published(b) for b in lease.table):
            self.keys.append(len(self.keys))
            lease.quarantine(self.keys[-1])

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def release_quarantine(self, data: st.DataObject) -> None:
        self.pool.release_quarantine(data.draw(st.sampled_from(self.keys)))

    @invariant()
    def books_agree_with_the_leases(self) -> None:
        self.pool.check_integrity()
        owned = [block_id for lease in self.leases for block_id in lease.table]
        assert [self.pool.num_references(BlockId(n)) for n in range(6)] == [owned.count(BlockId(n)) for n in range(6)]
        assert self.pool.counts().held == len(set(owned))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
