"""What blocks with several holders cost a plan: copies for all writers but the last, and blocks that come back."""

from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool
from engine.request import RequestId
from engine.sequence import Sequence, SequenceId
from engine.sharing import SharedBlocks
from kvtransfer.layout import BlockId
from tests.engine.making import make_hasher, make_request

PROMPT, PARTIAL = BlockId(0), BlockId(1)


def make_forks(num_forks: int) -> tuple[BlockPool, SharedBlocks, list[Sequence]]:
    """Sequences that hold block 0, which is full, and block 1, which is not."""
    pool = BlockPool(16)
    request = make_request("a", range(6), choices=tuple(range(num_forks)))
    with BlockLease(pool) as lease:
        lease.extend(2)
        forks = [
            Sequence(request, make_hasher(), lease.fork(), 0.0, choices=(choice,), num_computed_tokens=6)
            for choice in range(num_forks)
        ]
    return pool, SharedBlocks(pool), forks


def name(choice: int) -> SequenceId:
    return SequenceId(RequestId("a"), choice)


def test_only_a_block_that_others_hold_costs_anything() -> None:
    _, shared, (one,) = make_forks(1)
    assert shared.written_by(one) is None
    assert shared.cost_of_write(None) == 0
    _, _, (two, _) = make_forks(2)
    two.num_computed_tokens = 8
    assert shared.written_by(two) is None  # its next block is a new one


def test_every_writer_copies_but_the_last_of_all_holders() -> None:
    _, shared, forks = make_forks(3)
    costs = []
    for fork in forks:
        written = shared.written_by(fork)
        assert written == PARTIAL
        costs.append(shared.cost_of_write(written))
        shared.write(fork, written)
    assert costs == [1, 1, 0]
    assert shared.copies() == {name(0): PARTIAL, name(1): PARTIAL}


def test_all_writers_copy_while_one_holder_does_not_write() -> None:
    _, shared, forks = make_forks(3)
    for fork in forks[:2]:
        shared.write(fork, PARTIAL)
    assert shared.copies() == {name(0): PARTIAL, name(1): PARTIAL}


def test_a_holder_that_gives_its_blocks_back_saves_a_copy_and_frees_none() -> None:
    _, shared, forks = make_forks(3)
    for fork in forks[:2]:
        shared.write(fork, PARTIAL)
    assert shared.give_back(forks[2]) == 1
    assert shared.copies() == {name(0): PARTIAL}


def test_a_writer_that_gives_its_blocks_back_leaves_the_others_as_they_were() -> None:
    _, shared, forks = make_forks(3)
    for fork in forks:
        shared.write(fork, PARTIAL)
    assert shared.give_back(forks[0]) == 1  # the block for its copy
    assert shared.copies() == {name(1): PARTIAL}
    assert shared.give_back(forks[2]) == 1
    assert shared.copies() == {}


def test_the_last_of_several_holders_to_go_frees_what_they_shared() -> None:
    _, shared, forks = make_forks(3)
    forks[0].lease.extend(1)
    assert [shared.give_back(fork) for fork in forks] == [1, 0, 2]


def test_a_writer_that_was_alone_once_others_gave_way_needs_no_copy() -> None:
    _, shared, forks = make_forks(2)
    assert shared.cost_of_write(PARTIAL) == 1
    assert shared.give_back(forks[0]) == 0
    assert shared.cost_of_write(PARTIAL) == 0
    shared.write(forks[1], PARTIAL)
    assert shared.copies() == {}


def test_a_replaced_block_stays_held_until_it_is_released_and_comes_back_when_it_is_restored() -> None:
    pool, _, (one, two) = make_forks(2)
    before = one.lease.table
    replaced = one.lease.replace(1)
    assert (list(before), list(one.lease.table), list(replaced.table)) == ([0, 1], [0, 2], [1])
    assert [pool.num_references(block_id) for block_id in (PROMPT, PARTIAL, BlockId(2))] == [2, 2, 1]
    one.lease.restore(1, replaced)
    assert (list(one.lease.table), list(replaced.table)) == ([0, 1], [])
    assert pool.counts().held == 2
    one.lease.replace(1).release()
    assert pool.num_references(PARTIAL) == 1
    for fork in (one, two):
        fork.release_blocks()
    assert pool.counts().free == 16
