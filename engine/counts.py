"""How full an engine is, as numbers for people and routers."""

from dataclasses import dataclass

from engine.cache.pool import BlockPool
from engine.live import LiveSequences
from engine.sequence import SequenceState


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounts:
    """How full the engine is, read from the sets that the numbers describe.

    A request is one sequence until it is forked, then one for each choice. `num_running` sequences can be computed in
    the next step; `num_waiting` wait for their turn, for KV from elsewhere or for a grant; `num_held` are prefills that
    wait for their release. `num_pending_tokens` are known and not computed. `num_copied_blocks` counts from the start:
    blocks copied because a choice had to write into one that others still held.
    """

    total_blocks: int
    free_blocks: int
    held_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    num_running: int
    num_waiting: int
    num_held: int
    num_pending_tokens: int
    engine_steps: int
    num_copied_blocks: int


def count(live: LiveSequences, pool: BlockPool, *, engine_steps: int, num_copied_blocks: int) -> EngineCounts:
    """Counts between two steps."""
    blocks = pool.counts()
    sequences = list(live)
    num_held = sum(1 for s in sequences if s.state is SequenceState.HELD)
    num_running = sum(1 for s in sequences if s.state is SequenceState.RUNNING and not s.is_paused)
    return EngineCounts(
        total_blocks=blocks.total,
        free_blocks=blocks.free,
        held_blocks=blocks.held,
        cached_blocks=blocks.cached,
        quarantined_blocks=blocks.quarantined,
        num_running=num_running,
        num_waiting=len(sequences) - num_held - num_running,
        num_held=num_held,
        num_pending_tokens=sum(s.num_pending_tokens for s in sequences if s.state is not SequenceState.HELD),
        engine_steps=engine_steps,
        num_copied_blocks=num_copied_blocks,
    )
