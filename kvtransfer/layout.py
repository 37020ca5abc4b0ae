"""What the bytes of a KV pool mean. Pure values: no torch, no I/O.

A pool is `uint8[num_blocks, page_bytes]`. For a group of layers a block is
`[num_kv_heads, num_layers, 2, block_size, head_dim]`: head-major, so that one KV head's share of a block is one
contiguous span (`head_span_bytes`), whatever the tensor-parallel degree of the two sides.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, NewType

BlockId = NewType("BlockId", int)

KVDtype = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: dict[KVDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with equal needs: one block table, one block size."""

    kind: Literal["full"]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: KVDtype

    @property
    def head_span_bytes(self) -> int:
        """Bytes of one KV head in one block: keys and values of all layers of the group."""
        return self.num_layers * 2 * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.num_kv_heads * self.head_span_bytes

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """One block as a tensor: [num_kv_heads, num_layers, 2, block_size, head_dim]."""
        return (self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All groups of a model. Two pools may exchange blocks only when their `layout_id` is equal."""

    model_digest: str
    groups: tuple[KVGroup, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of the pool: a block of any group fits one page."""
        return max(group.block_bytes for group in self.groups)

    @property
    def layout_id(self) -> str:
        """Digest of every field, in hexadecimal."""
        text = "|".join([self.model_digest, *(repr(group) for group in self.groups)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
