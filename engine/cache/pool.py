"""Who owns which KV block: reference counts, reuse order, quarantine. Engine thread only.

A block is free (nobody's, content worthless), held (referenced by leases), cached (published in the prefix cache,
unreferenced, taken back when somebody needs room) or quarantined (unreferenced, but a read from elsewhere may still
write into it). The pool knows nothing of tokens and hashes; it must never hand out a block that anybody references or
that is quarantined.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kvtransfer.layout import BlockId


class BlockState(Enum):
    """Where a block is; every block is in exactly one state."""

    FREE = "free"
    HELD = "held"
    CACHED = "cached"
    QUARANTINED = "quarantined"


class PoolCounts(NamedTuple):
    """Blocks by state; the last four add up to `total`."""

    total: int
    free: int
    held: int
    cached: int
    quarantined: int


class IntegrityError(RuntimeError):
    """The books contradict themselves: a defect of the engine, never of a request."""


@dataclass(slots=True, eq=False)
class _Block:
    block_id: BlockId
    state: BlockState = BlockState.FREE
    generation: int = 0
    num_references: int = 0
    is_published: bool = False
    previous: "_Block | None" = field(default=None, repr=False)
    next: "_Block | None" = field(default=None, repr=False)


class _BlockQueue:
    """Blocks in order of reuse, linked through the blocks themselves.

    Not a deque: a prefix hit takes a cached block out of the middle, which costs a deque a walk over the whole pool.
    The links live in the block records, so every operation is O(1) and allocates nothing.
    """

    def __init__(self) -> None:
        self._first: _Block | None = None
        self._last: _Block | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Block]:
        block = self._first
        while block is not None:
            yield block
            block = block.next

    def append(self, block: _Block) -> None:
        """Puts `block` last: it is reused after all that are here now."""
        block.previous, block.next = self._last, None
        if self._last is None:
            self._first = block
        else:
            self._last.next = block
        self._last = block
        self._length += 1

    def remove(self, block: _Block) -> None:
        """Takes `block` out, wherever it is."""
        if block.previous is None:
            self._first = block.next
        else:
            block.previous.next = block.next
        if block.next is None:
            self._last = block.previous
        else:
            block.next.previous = block.previous
        block.previous = block.next = None
        self._length -= 1

    def pop_first(self) -> _Block:
        """Takes the block that has waited longest."""
        block = self._first
        if block is None:
            raise IntegrityError("a block is taken from an empty queue")
        self.remove(block)
        return block


class BlockPool:
    """All KV blocks of one worker, by number. Content is elsewhere."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, needs at least 1")
        self._blocks = [_Block(BlockId(number)) for number in range(num_blocks)]
        self._free = _BlockQueue()
        """Longest free first: bytes that a late reader was promised survive as long as possible."""
        self._cached = _BlockQueue()
        """Least recently used first."""
        self._quarantined: dict[int, list[BlockId]] = {}
        self._on_evict: Callable[[BlockId], None] | None = None
        for block in self._blocks:
            self._free.append(block)

    @property
    def num_blocks(self) -> int:
        """All blocks, whatever their state."""
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can have now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def counts(self) -> PoolCounts:
        """Blocks by state, read from the queues that hold them."""
        total, free, cached = len(self._blocks), len(self._free), len(self._cached)
        quarantined = sum(len(block_ids) for block_ids in self._quarantined.values())
        return PoolCounts(total, free, total - free - cached - quarantined, cached, quarantined)

    def state(self, block_id: BlockId) -> BlockState:
        """The state of one block."""
        return self._blocks[block_id].state

    def generation(self, block_id: BlockId) -> int:
        """How often the block was allocated; a reader that remembers another number has stale bytes."""
        return self._blocks[block_id].generation

    def num_references(self, block_id: BlockId) -> int:
        """How many leases hold the block."""
        return self._blocks[block_id].num_references

    def is_published(self, block_id: BlockId) -> bool:
        """Whether the prefix cache names the block; nobody writes into it then."""
        return self._blocks[block_id].is_published

    def listen(self, on_evict: Callable[[BlockId], None]) -> None:
        """Registers who is told that a published block lost its content. One listener."""
        self._on_evict = on_evict

    def publish(self, block_id: BlockId) -> None:
        """Marks a held block as published: unreferenced, it stays cached instead of becoming free."""
        block = self._blocks[block_id]
        if block.state is not BlockState.HELD or block.is_published:
            raise IntegrityError(f"cannot publish {block}")
        block.is_published = True

    def allocate(self, num_blocks: int) -> tuple[BlockId, ...]:
        """Takes blocks for one reference each: free ones first, then cached ones, least recently used first.

        The caller has checked `num_available`; nothing is taken when it does not suffice.
        """
        if not 0 <= num_blocks <= self.num_available:
            raise IntegrityError(f"{num_blocks} blocks wanted, {self.num_available} available")
        taken: list[BlockId] = []
        for _ in range(num_blocks):
            block = self._free.pop_first() if self._free else self._evict()
            block.state = BlockState.HELD
            block.num_references = 1
            block.generation += 1
            taken.append(block.block_id)
        return tuple(taken)

    def retain(self, block_id: BlockId) -> None:
        """Adds a reference to a block that is held or cached."""
        block = self._blocks[block_id]
        if block.state not in (BlockState.HELD, BlockState.CACHED):
            raise IntegrityError(f"cannot share {block}")
        if block.state is BlockState.CACHED:
            self._cached.remove(block)
            block.state = BlockState.HELD
        block.num_references += 1

    def release(self, block_id: BlockId) -> None:
        """Gives one reference back; the last one leaves the block cached when it is published, else free."""
        block = self._blocks[block_id]
        if block.state is not BlockState.HELD:
            raise IntegrityError(f"cannot release {block}")
        block.num_references -= 1
        if block.num_references:
            return
        if block.is_published:
            block.state = BlockState.CACHED
            self._cached.append(block)
        else:
            block.state = BlockState.FREE
            self._free.append(block)

    def quarantine(self, block_ids: Sequence[BlockId], key: int) -> None:
        """Turns the only references to `block_ids` into quarantine under `key`, until `release_quarantine(key)`."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.state is not BlockState.HELD or block.num_references != 1 or block.is_published:
                raise IntegrityError(f"cannot quarantine {block}: it is shared, or final")
            block.state = BlockState.QUARANTINED
            block.num_references = 0
            self._quarantined.setdefault(key, []).append(block_id)

    def release_quarantine(self, key: int) -> int:
        """Frees what is quarantined under `key` and returns how many blocks that were; 0 for an unknown key."""
        block_ids = self._quarantined.pop(key, [])
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.state = BlockState.FREE
            self._free.append(block)
        return len(block_ids)

    def quarantine_keys(self) -> frozenset[int]:
        """Keys under which something is quarantined."""
        return frozenset(self._quarantined)

    def check_integrity(self) -> None:
        """Recomputes every count and link from scratch. Raises IntegrityError naming the first contradiction."""
        found: dict[BlockId, BlockState] = {}
        for name, queue, state in (("free", self._free, BlockState.FREE), ("cached", self._cached, BlockState.CACHED)):
            previous: _Block | None = None
            for block in queue:
                if block.block_id in found:
                    raise IntegrityError(f"{block} is queued twice, second time in the {name} queue")
                if block.previous is not previous:
                    raise IntegrityError(f"{block} of the {name} queue links back to {block.previous}, not {previous}")
                found[block.block_id], previous = state, block
            if len(queue) != sum(1 for each in found.values() if each is state):
                raise IntegrityError(f"the {name} queue counts {len(queue)} blocks and links another number")
        for key, block_ids in self._quarantined.items():
            for block_id in block_ids:
                if block_id in found:
                    raise IntegrityError(f"{self._blocks[block_id]} is quarantined under {key} and in a second place")
                found[block_id] = BlockState.QUARANTINED
        for block in self._blocks:
            self._check_block(block, found.get(block.block_id, BlockState.HELD))
        counts = self.counts()
        if counts.total != counts.free + counts.held + counts.cached + counts.quarantined:
            raise IntegrityError(f"states do not add up: {counts}")

    def _check_block(self, block: _Block, place: BlockState) -> None:
        if block.state is not place:
            raise IntegrityError(f"{block} is {block.state.value} by its record, {place.value} by its place")
        if (block.num_references > 0) is not (place is BlockState.HELD):
            raise IntegrityError(f"{block} has {block.num_references} references")
        if block.is_published and place not in (BlockState.HELD, BlockState.CACHED):
            raise IntegrityError(f"{block} is published without content")
        if place is BlockState.CACHED and not block.is_published:
            raise IntegrityError(f"{block} is cached but not published")

    def _evict(self) -> _Block:
        block = self._cached.pop_first()
        block.is_published = False
        if self._on_evict is not None:
            self._on_evict(block.block_id)
        return block
