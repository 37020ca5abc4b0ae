"""A step's slices as the numbers that a model reads. Built once per step; nothing here decides or computes."""

from array import array
from collections.abc import Iterator

from engine.step import SequenceSlice
from kernels.backend import Batch


def lay_out(slices: tuple[SequenceSlice, ...], *, block_size: int) -> Batch:
    """Lays the slices out, one after another.

    A row is drawn from where a slice draws, its last; rows are scored where they have a target. Both in the order of
    the slices. Raises ValueError for a slice without tokens, or whose targets or blocks do not fit.
    """
    # Plain lists, a range at a time: after a step that has filled the caches with weights, little else is as quick.
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_starts = [0]
    context_lens: list[int] = []
    drawn_rows: list[int] = []
    scored_rows: list[int] = []
    for part in slices:
        _check(part, block_size)
        begin, end = len(token_ids), part.start + len(part.token_ids)
        token_ids += part.token_ids
        positions += range(part.start, end)
        for slots_of_block in _slots(part, end, block_size):
            slots += slots_of_block
        query_starts.append(len(token_ids))
        context_lens.append(end)
        if part.draw is not None:
            drawn_rows.append(len(token_ids) - 1)
        if part.score is not None:
            scored_rows += range(begin, begin + len(part.score.targets))
    max_blocks = -(-max(context_lens, default=0) // block_size)
    block_tables: list[int] = []
    for part in slices:
        block_tables += part.block_ids[:max_blocks]  # not those that were taken ahead
        block_tables += [0] * (max_blocks - len(part.block_ids))
    numbers = token_ids + positions + slots + query_starts + context_lens + block_tables + drawn_rows + scored_rows
    return Batch(
        array("q", numbers),
        num_tokens=len(token_ids),
        num_sequences=len(slices),
        max_blocks=max_blocks,
        num_drawn=len(drawn_rows),
        num_scored=len(scored_rows),
    )


def _slots(part: SequenceSlice, end: int, block_size: int) -> Iterator[range]:
    """The slots of positions [part.start, end), block by block."""
    for index in range(part.start // block_size, -(-end // block_size)):
        first = index * block_size
        offset = part.block_ids[index] * block_size - first
        yield range(max(part.start, first) + offset, min(end, first + block_size) + offset)


def _check(part: SequenceSlice, block_size: int) -> None:
    """Raises ValueError for a slice without tokens, or whose targets or blocks do not fit."""
    end = part.start + len(part.token_ids)
    if not part.token_ids or len(part.block_ids) * block_size < end:
        raise ValueError(
            f"slice of {part.request_id} has {len(part.token_ids)} tokens up to position {end} "
            f"and {len(part.block_ids)} blocks of {block_size}"
        )
    if part.score is not None and len(part.score.targets) > len(part.token_ids):
        raise ValueError(
            f"slice of {part.request_id} has {len(part.score.targets)} targets for {len(part.token_ids)} tokens"
        )
