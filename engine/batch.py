"""A step's slices as flat tensors: what the model reads. Built once per step; nothing here decides or computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.step import SequenceSlice
from kernels.backend import Spans


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All token rows of a step, sequence after sequence. int64, on the CPU.

    token_ids, positions: [num_tokens]. slots: [num_tokens], where each row's key and value go (block id x block size +
    offset). spans: where sequences begin, their contexts and block tables. head_rows: [num_drawn + num_scored], rows
    whose logits are wanted: the last one of each slice that draws, then those with a target to score, both in the order
    of the slices. A row may be among both.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    spans: Spans
    head_rows: Tensor
    num_drawn: int

    @classmethod
    def from_slices(cls, slices: tuple[SequenceSlice, ...], *, block_size: int) -> "Batch":
        """Lays the slices out. Raises ValueError for one without tokens, or whose targets or blocks do not fit."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        context_lens: list[int] = []
        drawn_rows: list[int] = []
        scored_rows: list[int] = []
        for part in slices:
            end = part.start + len(part.token_ids)
            if not part.token_ids or len(part.block_ids) * block_size < end:
                raise ValueError(
                    f"slice of {part.request_id} has {len(part.token_ids)} tokens up to position {end} "
                    f"and {len(part.block_ids)} blocks of {block_size}"
                )
            num_targets = 0 if part.score is None else len(part.score.targets)
            if num_targets > len(part.token_ids):
                raise ValueError(
                    f"slice of {part.request_id} has {num_targets} targets for {len(part.token_ids)} tokens"
                )
            scored_rows += range(len(token_ids), len(token_ids) + num_targets)
            span = range(part.start, end)
            token_ids += part.token_ids
            positions += span
            slots += [part.block_ids[p // block_size] * block_size + p % block_size for p in span]
            query_starts.append(len(token_ids))
            context_lens.append(end)
            if part.draw is not None:
                drawn_rows.append(len(token_ids) - 1)
        max_blocks = max((-(-context // block_size) for context in context_lens), default=0)
        tables = [[*part.block_ids[:max_blocks], *[0] * (max_blocks - len(part.block_ids))] for part in slices]
        return cls(
            token_ids=_int64(token_ids),
            positions=_int64(positions),
            slots=_int64(slots),
            spans=Spans(
                query_starts=_int64(query_starts),
                context_lens=_int64(context_lens),
                block_tables=torch.tensor(tables, dtype=torch.int64).view(len(slices), max_blocks),
            ),
            head_rows=_int64(drawn_rows + scored_rows),
            num_drawn=len(drawn_rows),
        )


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
