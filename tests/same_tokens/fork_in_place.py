"""A pytest plugin that breaks the sharing of blocks: every holder of a block takes itself for the only one.

So choices write in place into a block that others still hold. The books, which would notice, are not checked: tokens
and log-probabilities have to show it.
"""

import pytest

from engine.cache.pool import BlockPool
from engine.live import LiveSequences
from kvtransfer.layout import BlockId


@pytest.fixture(autouse=True)
def hide_other_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    num_references = BlockPool.num_references

    def at_most_one(pool: BlockPool, block_id: BlockId) -> int:
        return min(num_references(pool, block_id), 1)

    monkeypatch.setattr(BlockPool, "num_references", at_most_one)
    monkeypatch.setattr(LiveSequences, "check_integrity", lambda _live, _pool: None)
