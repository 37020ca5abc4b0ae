"""Steps of nothing but one kernel, as a model's step calls it: in compiled code, one call after the other.

Every call of a step has weights or KV of its own, so that no cache holds them. It measures nothing.
"""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bench.limits import huge_pages
from bench.shapes import ModelShape
from kernels.backend import Backend, Batch, Definition, Operations, Rotation, WeightFormat

_BLOCK_SIZE: Final = 16
_COLD_BYTES: Final = 2**28
"""What all calls of a step read together, at least: several times the largest cache."""
_ENOUGH_OPERATIONS: Final = 2 * 10**10
"""What a step needs no more than where computing is what takes so long."""


@dataclass(frozen=True, slots=True)
class KernelStep:
    """`run` computes a step of `num_calls` calls, and returns what the last one made."""

    run: Callable[[], Tensor]
    num_calls: int


def linear_steps(
    backend: Backend, weight: Tensor, form: WeightFormat, *, weight_bytes: float, rows: Sequence[int]
) -> Mapping[int, KernelStep]:
    """One step for each number of rows. weight: [N, K], whose copies take `weight_bytes` each as they are packed."""
    num_copies = math.ceil(_COLD_BYTES / weight_bytes)
    layers = [backend.prepare_linear(weight, stored=form) for _ in range(num_copies)]
    x = torch.randn(max(rows), weight.shape[1]).to(weight.dtype)

    def step(num_rows: int) -> KernelStep:
        used = layers[: _num_calls(weight_bytes, 2 * num_rows * weight.numel())]

        def define(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
            del pages
            hidden = ops.embedding(batch.token_ids, x)
            return ([ops.linear(layer, hidden) for layer in used][-1],)

        return _compiled(backend, define, _batch_of_rows(num_rows), torch.empty(0), num_calls=len(used))

    return {num_rows: step(num_rows) for num_rows in rows}


def attention_step(
    backend: Backend, shape: ModelShape, dtype: torch.dtype, *, batch: int, queries: int, context: int
) -> KernelStep:
    """Attention of `batch` sequences of `context` tokens, their last `queries` asking, layer after layer.

    The queries' own keys and values are written once before, which is part of every figure.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    layer_bytes = batch * context * 2 * kv_heads * dim * dtype.itemsize
    num_layers = _num_calls(layer_bytes, 4 * batch * heads * dim * queries * context)
    num_blocks = batch * context // _BLOCK_SIZE
    page_shape = num_blocks, kv_heads, num_layers, 2, _BLOCK_SIZE, dim
    pages = huge_pages(math.prod(page_shape) * dtype.itemsize).view(dtype)[: math.prod(page_shape)].view(page_shape)
    pages.copy_(torch.randn(1, kv_heads, 1, 2, _BLOCK_SIZE, dim).expand(page_shape))
    x = torch.randn(1, (heads + 2 * kv_heads) * dim).to(dtype)
    tables = torch.ones(context, dim // 2), torch.zeros(context, dim // 2)

    def define(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        rows = ops.embedding(batch.token_ids, x)
        query, keys, values = torch.split(rows.view(len(rows), -1, dim), [heads, kv_heads, kv_heads], dim=1)
        rotation = Rotation(*tables, batch.positions)
        query = ops.rotate_and_write(query, (keys, values), rotation, pages=pages, layer=0, slots=batch.slots)
        attended = [
            ops.paged_attention(query, pages, batch.spans, layer=layer, scale=dim**-0.5) for layer in range(num_layers)
        ]
        return (attended[-1].flatten(1),)

    block_tables = torch.randperm(num_blocks).view(batch, -1)
    return _compiled(backend, define, _batch_of_sequences(block_tables, queries), pages, num_calls=num_layers)


def _num_calls(call_bytes: float, call_operations: float) -> int:
    """So many that no cache holds what all of them read, unless computing takes long enough with fewer."""
    return math.ceil(min(_COLD_BYTES / call_bytes, max(1, _ENOUGH_OPERATIONS / call_operations)))


def _compiled(backend: Backend, definition: Definition, batch: Batch, pages: Tensor, *, num_calls: int) -> KernelStep:
    compute = backend.compile_step(definition)
    return KernelStep(lambda: compute(batch, pages)[0], num_calls)


def _batch_of_rows(num_rows: int) -> Batch:
    """Rows that only linear layers compute: of one sequence, which has no block."""
    numbers = [*range(num_rows), *[0] * (2 * num_rows), 0, num_rows, num_rows]
    return Batch(array("q", numbers), num_tokens=num_rows, num_sequences=1, max_blocks=0, num_drawn=0, num_scored=0)


def _batch_of_sequences(block_tables: Tensor, queries: int) -> Batch:
    """The last `queries` tokens of sequences that fill their blocks. block_tables: [num_sequences, num_blocks]."""
    num_sequences, max_blocks = block_tables.shape
    context = max_blocks * _BLOCK_SIZE
    slots = (block_tables[..., None] * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE)).flatten(1)[:, -queries:]
    positions = torch.arange(context)[-queries:].expand_as(slots)
    parts = (
        torch.zeros_like(slots),
        positions,
        slots,
        torch.arange(num_sequences + 1) * queries,
        torch.full((num_sequences,), context),
        block_tables,
    )
    numbers = array("q", torch.cat([part.flatten() for part in parts]).tolist())
    return Batch(
        numbers,
        num_tokens=slots.numel(),
        num_sequences=num_sequences,
        max_blocks=max_blocks,
        num_drawn=0,
        num_scored=0,
    )
