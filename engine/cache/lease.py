"""How a sequence owns blocks: a lease, and the table that says which block holds which positions. Engine thread only.

Nothing outside a lease takes or gives a reference, so nothing is freed twice and nothing is forgotten.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from engine.cache.pool import BlockPool
from kvtransfer.layout import BlockId


class BlockTable:
    """Block ids of a sequence by block index. Append-only: what was read from it once stays true."""

    __slots__ = ("_block_ids",)

    def __init__(self, block_ids: Sequence[BlockId] = ()) -> None:
        self._block_ids: tuple[BlockId, ...] = tuple(block_ids)

    def __len__(self) -> int:
        return len(self._block_ids)

    def __getitem__(self, index: int) -> BlockId:
        return self._block_ids[index]

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._block_ids)

    def __repr__(self) -> str:
        return f"BlockTable({list(self._block_ids)})"

    def append(self, block_ids: Sequence[BlockId]) -> None:
        """Adds blocks at the end."""
        self._block_ids += tuple(block_ids)

    def first(self, num_blocks: int) -> tuple[BlockId, ...]:
        """The first `num_blocks` ids; the same tuple every time while the table has not grown."""
        return self._block_ids if num_blocks == len(self._block_ids) else self._block_ids[:num_blocks]


class BlockLease:
    """References to blocks, given back exactly once: by `release`, by the end of a `with`, or by `quarantine`.

    `table` lists the blocks in the order in which they were taken.
    """

    __slots__ = ("_pool", "table")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.table = BlockTable()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __len__(self) -> int:
        return len(self.table)

    def share(self, block_ids: Sequence[BlockId]) -> None:
        """Adds references to blocks that hold content already."""
        for block_id in block_ids:
            self._pool.retain(block_id)
        self.table.append(block_ids)

    def extend(self, num_blocks: int) -> None:
        """Adds newly allocated blocks; the caller has checked that they are available."""
        if num_blocks:
            self.table.append(self._pool.allocate(num_blocks))

    def fork(self) -> "BlockLease":
        """A second lease of the same blocks."""
        other = BlockLease(self._pool)
        other.share(tuple(self.table))
        return other

    def replace(self, index: int) -> "BlockLease":
        """Puts a newly allocated block at `index`; the reference to the old one moves to the lease that is returned.

        The caller has checked that a block is available. The lease has a new table; one read before stays as it was.
        """
        (new,) = self._pool.allocate(1)
        return self._put(index, new)

    def restore(self, index: int, replaced: "BlockLease") -> None:
        """Undoes `replace`, which returned `replaced`; the block that it put there is given back."""
        (old,) = replaced.table
        replaced.table = BlockTable()
        self._put(index, old).release()

    def _put(self, index: int, block_id: BlockId) -> "BlockLease":
        rest = BlockLease(self._pool)
        block_ids = tuple(self.table)
        rest.table.append((block_ids[index],))
        self.table = BlockTable((*block_ids[:index], block_id, *block_ids[index + 1 :]))
        return rest

    def split(self, num_kept: int) -> "BlockLease":
        """Keeps the first `num_kept` blocks; the references to the others move to the lease that is returned.

        Both leases have new tables; those read before stay as they were.
        """
        rest = BlockLease(self._pool)
        kept = self.table.first(num_kept)
        rest.table.append(tuple(self.table)[num_kept:])
        self.table = BlockTable(kept)
        return rest

    def release(self) -> None:
        """Gives all references back, the last block first: a chain's tail is evicted before its head. Idempotent."""
        table, self.table = self.table, BlockTable()
        for block_id in reversed(tuple(table)):
            self._pool.release(block_id)

    def quarantine(self, key: int) -> None:
        """Gives all references up to the quarantine `key`."""
        table, self.table = self.table, BlockTable()
        self._pool.quarantine(tuple(table), key)
