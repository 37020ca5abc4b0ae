"""What a sender says about a block, and the proof that the bytes that arrived are that block.

The engine may read a block that came from elsewhere only as a `VerifiedBlock`, and only `verify` makes one. On
one-sided reads this is the whole defence against a sender whose block was reused in the middle: checksums decide,
nothing else.
"""

from dataclasses import InitVar, dataclass
from typing import Final

from kvtransfer.checksum import head_checksums
from kvtransfer.layout import BlockId, KVGroup
from staffetta.errors import CorruptBlockError

_VERIFIED: Final = object()


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block as its owner describes it. Everything here is the peer's word until `verify`.

    `chain_hash` is empty for a block that is not full. `generation` counts allocations of the block, for diagnosis.
    """

    block_id: BlockId
    block_index: int
    num_tokens: int
    generation: int
    chain_hash: bytes
    head_checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VerifiedBlock:
    """A local block whose bytes are, beyond accident, those that `entry` announced. Only `verify` makes one."""

    block_id: BlockId
    entry: BlockEntry
    proof: InitVar[object]

    def __post_init__(self, proof: object) -> None:
        if proof is not _VERIFIED:
            raise TypeError("a VerifiedBlock comes from kvtransfer.manifest.verify and from nowhere else")


def verify(
    entry: BlockEntry,
    page: memoryview,
    group: KVGroup,
    *,
    block_id: BlockId,
    expected_index: int,
    expected_num_tokens: int,
    expected_chain_hash: bytes | None,
) -> VerifiedBlock:
    """Checks that local block `block_id`, whose bytes are `page`, is the block expected at this place of the sequence.

    `expected_chain_hash` is None for a block that is not full. The checks, cheapest first: index, token count, chain
    hash, number of checksums, length, checksums. Raises CorruptBlockError naming the block's index and both values.
    The caller holds the block's lease and the read has ended: nobody writes to `page` during or after the call.
    """
    _compare(expected_index, "index", expected_index, entry.block_index)
    _compare(expected_index, "token count", expected_num_tokens, entry.num_tokens)
    _compare(expected_index, "chain hash", (expected_chain_hash or b"").hex(), entry.chain_hash.hex())
    _compare(expected_index, "number of head checksums", group.num_kv_heads, len(entry.head_checksums))
    if len(page) < group.block_bytes:
        _compare(expected_index, "length in bytes", group.block_bytes, len(page))
    for head, actual in enumerate(head_checksums(page, group)):
        announced = entry.head_checksums[head]
        if actual != announced:
            raise CorruptBlockError(
                f"block {expected_index}, KV head {head}: checksum announced {announced:016x}, bytes have {actual:016x}"
            )
    return VerifiedBlock(block_id, entry, _VERIFIED)


def _compare(block_index: int, what: str, expected: object, announced: object) -> None:
    if expected != announced:
        raise CorruptBlockError(f"block {block_index}: {what} expected {expected}, got {announced}")
