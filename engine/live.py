"""The sequences of all requests that have no ending, and of prefills that are held. Engine thread only."""

from collections import Counter
from collections.abc import Iterator

from engine.cache.pool import BlockPool, IntegrityError
from engine.request import RequestId
from engine.sequence import Sequence, SequenceState
from kvtransfer.layout import BlockId


class LiveSequences:
    """Sequences by request: one for each, until it is forked. Iteration goes through all, in the order of arrival."""

    def __init__(self) -> None:
        self._by_request: dict[RequestId, list[Sequence]] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for sequences in self._by_request.values() for sequence in sequences)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._by_request

    @property
    def num_places(self) -> int:
        """Places taken: one for each choice that has no ending, and one for each prefill until it is released."""
        return sum(1 if sequence.is_prefill else len(sequence.open_choices) for sequence in self)

    def of(self, request_id: RequestId) -> tuple[Sequence, ...]:
        """The sequences of one request; none when it is over, or never was."""
        return tuple(self._by_request.get(request_id, ()))

    def add(self, sequence: Sequence) -> None:
        """Adds the sequence of a new request."""
        self._by_request[sequence.request_id] = [sequence]

    def replace(self, parent: Sequence, forks: list[Sequence]) -> None:
        """Puts the forks of a sequence, if there are any, into its place."""
        if forks:
            self._by_request[parent.request_id] = list(forks)
        else:
            del self._by_request[parent.request_id]

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, and its request with the last one."""
        rest = [each for each in self._by_request[sequence.request_id] if each is not sequence]
        self.replace(sequence, rest)

    def check_integrity(self, pool: BlockPool) -> None:
        """Recomputes who owns what. Raises IntegrityError naming the first contradiction. Between steps only."""
        owned: Counter[BlockId] = Counter()
        contents: dict[BlockId, tuple[int, ...]] = {}
        for sequence in self:
            table, size = tuple(sequence.lease.table), sequence.hasher.block_size
            owned.update(table)
            if sequence.num_computed_tokens > len(table) * size:
                raise IntegrityError(f"{sequence.sequence_id} computed more than its {len(table)} blocks hold")
            num_full = sequence.num_computed_tokens // size
            if any(pool.is_published(block_id) for block_id in table[num_full:]):
                raise IntegrityError(f"{sequence.sequence_id} would write into a published block of {table}")
            if sequence.state is SequenceState.FINISHED or not sequence.open_choices:
                raise IntegrityError(f"{sequence.sequence_id} is finished and still here")
            computed = tuple(sequence.token_ids[: sequence.num_computed_tokens])
            for index, block_id in enumerate(table):
                # What a block means depends on all tokens up to its end; whoever wrote alone would know more of them.
                content = computed[: (index + 1) * size] if pool.num_references(block_id) > 1 else ()
                if contents.setdefault(block_id, content) != content:
                    raise IntegrityError(
                        f"block {block_id} is shared by {sequence.sequence_id} and changed by one only"
                    )
        for number in range(pool.num_blocks):
            block_id = BlockId(number)
            if pool.num_references(block_id) != owned[block_id]:
                num_references = pool.num_references(block_id)
                raise IntegrityError(
                    f"block {block_id} has {num_references} references, sequences own {owned[block_id]}"
                )
