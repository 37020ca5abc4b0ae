"""What a plan in the making means for blocks that several sequences hold: who gives them back, who writes into them.

Nobody writes into a block that somebody else holds. A sequence that must gets a copy first; but when everybody who
still holds the block writes into it, the last of them may do so in place. Only read and counted here, nothing changes.
"""

from collections import defaultdict

from engine.cache.pool import BlockPool
from engine.sequence import Sequence, SequenceId
from kvtransfer.layout import BlockId


class SharedBlocks:
    """The references that a plan leaves on blocks, and the copies that its writes cost."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._num_given_back: defaultdict[BlockId, int] = defaultdict(int)
        self._writers: dict[BlockId, list[SequenceId]] = {}
        self._written: dict[SequenceId, BlockId] = {}

    def written_by(self, sequence: Sequence) -> BlockId | None:
        """The block that the sequence writes into next, when others hold it now; None for its own, or a new one."""
        table, index = sequence.lease.table, sequence.num_computed_tokens // sequence.hasher.block_size
        return table[index] if index < len(table) and self._pool.num_references(table[index]) > 1 else None

    def cost_of_write(self, block_id: BlockId | None) -> int:
        """Blocks, 0 or 1, that copies take in addition when one more of its holders writes into `block_id`."""
        if block_id is None:
            return 0
        num_writers = len(self._writers.get(block_id, ()))
        return self._num_copies(block_id, num_writers + 1) - self._num_copies(block_id, num_writers)

    def write(self, sequence: Sequence, block_id: BlockId) -> None:
        """Notes that the plan has the sequence write into a block that it holds with others."""
        self._writers.setdefault(block_id, []).append(sequence.sequence_id)
        self._written[sequence.sequence_id] = block_id

    def give_back(self, victim: Sequence) -> int:
        """Notes that the plan takes all blocks of the sequence. Returns how many blocks that makes available.

        A block counts that nobody holds any more, and one that is not needed for a copy any more.
        """
        num_available = 0
        written = self._written.pop(victim.sequence_id, None)
        for block_id in victim.lease.table:
            writers = self._writers.get(block_id, [])
            num_copies = self._num_copies(block_id, len(writers))
            if block_id == written:
                writers.remove(victim.sequence_id)
            self._num_given_back[block_id] += 1
            num_available += num_copies - self._num_copies(block_id, len(writers))
            num_available += self._num_references(block_id) == 0
        return num_available

    def copies(self) -> dict[SequenceId, BlockId]:
        """The block that each sequence has to copy; those of the planned writers that are not here write in place."""
        return {
            sequence_id: block_id
            for block_id, writers in self._writers.items()
            for sequence_id in writers[: self._num_copies(block_id, len(writers))]
        }

    def _num_references(self, block_id: BlockId) -> int:
        return self._pool.num_references(block_id) - self._num_given_back[block_id]

    def _num_copies(self, block_id: BlockId, num_writers: int) -> int:
        is_everybody = num_writers == self._num_references(block_id)
        return num_writers - 1 if is_everybody and num_writers else num_writers
