"""Records the operations of a model's definition, so that they can be run as one call.

The definition runs once, on operations that compute nothing: each notes what it was given and returns an empty tensor
of the right shape, and from which tensors come back to which operations follows how values flow. What a recording
could not repeat (a number that no operation made, some of the rows, an input that is not the step's) is refused.
"""

from array import array
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import Batch, Definition, Linear, Rotation, Spans
from kernels.cpu.library import (
    DTYPES,
    MAX_RESULTS,
    NO_MATRIX,
    Matrix,
    OperationKind,
    PackedWeight,
    RowsOf,
    Screen,
    matrix,
    rows,
)
from kernels.cpu.linear import CpuLinear


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Rows that one operation makes and later ones read; equal only to itself."""

    rows_of: RowsOf
    columns: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; rows lie side by side."""
        return self.columns * self.dtype.itemsize


class Part(NamedTuple):
    """Columns of all rows of a value, as an operation reads or writes them; `matrix.data` is the offset in bytes."""

    value: Value
    matrix: Matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operation:
    """One operation, with arguments in the order of `src/step.cpp`; members that its kind has not are as here.

    A matrix among `inputs` is the same in every step: a weight, or `NO_MATRIX`.
    """

    kind: OperationKind
    inputs: tuple[Part | Matrix, ...]
    outputs: tuple[Part, ...]
    weight: PackedWeight = field(default_factory=PackedWeight)
    screen: Screen = field(default_factory=Screen)
    epsilon: float = 0.0
    scale: float = 0.0
    soft_cap: float = 0.0
    window: int = 0
    layer: int = 0
    num_heads: int = 0
    tables: tuple[Tensor, Tensor] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it reads or writes of values."""
        return *(each for each in self.inputs if isinstance(each, Part)), *self.outputs


class PageShape(NamedTuple):
    """What pages must be for a recording's operations; they may have more layers."""

    dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    num_layers: int


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A definition's operations in order, and the values that it returns.

    `keep` owns the memory of weights and tables. `page_shape` is None when no page is touched.
    """

    operations: tuple[Operation, ...]
    results: tuple[Value, ...]
    keep: tuple[object, ...]
    page_shape: PageShape | None


def record(definition: Definition) -> Recording:
    """Runs `definition` without computing. Raises ValueError or TypeError for what a recording could not repeat."""
    recorder = _Recorder()
    returned = definition(recorder, recorder.batch, recorder.pages)
    parts = [recorder.part(tensor) for tensor in returned]
    results = tuple(part.value for part in parts)
    is_whole = all(tensor.shape[1:] == (part.value.columns,) for tensor, part in zip(returned, parts, strict=True))
    _require(is_whole and 0 < len({*results}) == len(results) <= MAX_RESULTS, "it returns one or two values, whole")
    num_layers = 1 + max(operation.layer for operation in recorder.operations)
    page_shape = None if recorder.heads is None else PageShape(*recorder.heads, num_layers)
    return Recording(tuple(recorder.operations), results, tuple(recorder.keep), page_shape)


_NUM_ROWS = {RowsOf.TOKENS: 4, RowsOf.DRAWN: 2, RowsOf.SCORED: 3}
"""Rows of a recorded tensor. Any numbers will do that differ, and are not 1, which torch broadcasts."""


def _stand_in() -> Batch:
    """Stands for the batch of every step. Its numbers are never read."""
    tokens, drawn, scored = (_NUM_ROWS[rows_of] for rows_of in RowsOf)
    numbers = array("q", [0] * (3 * tokens + 2 + 1 + 1 + drawn + scored))
    return Batch(numbers, num_tokens=tokens, num_sequences=1, max_blocks=1, num_drawn=drawn, num_scored=scored)


class _Recorder:
    """The `kernels.backend.Operations` that take notes. Used for one recording."""

    def __init__(self) -> None:
        self.batch = _stand_in()
        self.pages = torch.empty(0)
        self.heads: tuple[torch.dtype, int, int] | None = None  # of keys and values, and how many, how large
        self.operations: list[Operation] = []
        self.keep: list[object] = []
        # By the address of its tensor's storage; the tensor is kept, so that no address is given out twice.
        self._values: dict[int, tuple[Value, Tensor]] = {}

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Notes `kernels.reference.embedding`."""
        _require(_is(token_ids, self.batch.token_ids), "embeddings are those of the batch's token_ids")
        out, part = self._make(RowsOf.TOKENS, weight.shape[1], dtype=weight.dtype)
        self.operations.append(Operation(kind=OperationKind.TAKE_ROWS, inputs=(self._weight(weight),), outputs=(part,)))
        return out

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor:
        """Notes `kernels.reference.take_rows`."""
        table = self._rows(x)
        _require(table.value.rows_of is RowsOf.TOKENS, "rows are taken of all tokens")
        is_drawn = _is(indices, self.batch.drawn_rows)
        _require(is_drawn or _is(indices, self.batch.scored_rows), "rows are the batch's drawn_rows or scored_rows")
        out, part = self._make(RowsOf.DRAWN if is_drawn else RowsOf.SCORED, x.shape[1], dtype=x.dtype)
        self.operations.append(Operation(kind=OperationKind.TAKE_ROWS, inputs=(table,), outputs=(part,)))
        return out

    def linear(
        self, layer: Linear, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Notes a layer of `prepare_linear` or `prepare_gated_linear`."""
        if not isinstance(layer, CpuLinear):
            raise TypeError(f"{layer!r} is no linear layer of the compiled kernels")
        source = self._rows(x)
        _require(source.matrix.columns == layer.packed.inputs, f"x has shape {list(x.shape)}, the layer another width")
        out, part = self._make(source.value.rows_of, layer.out_features, dtype=dtype or x.dtype)
        self.keep.append(layer)
        self.operations.append(
            Operation(
                kind=OperationKind.LINEAR,
                inputs=(source, self._residual(residual, part)),
                outputs=(part,),
                weight=layer.packed,
                screen=layer.screened if residual is None and dtype is torch.float32 else Screen(),
            )
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Notes `kernels.reference.rms_norm`."""
        source = self._rows(x)
        out, part = self._make(source.value.rows_of, x.shape[1], dtype=x.dtype)
        inputs = source, NO_MATRIX, self._weight(weight)
        self.operations.append(Operation(kind=OperationKind.RMS_NORM, inputs=inputs, outputs=(part,), epsilon=eps))
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Notes `kernels.reference.add_rms_norm`."""
        source = self._rows(x)
        out, part = self._make(source.value.rows_of, x.shape[1], dtype=x.dtype)
        total, total_part = self._make(source.value.rows_of, x.shape[1], dtype=x.dtype)
        inputs = source, self._residual(residual, part), self._weight(weight)
        self.operations.append(
            Operation(kind=OperationKind.RMS_NORM, inputs=inputs, outputs=(part, total_part), epsilon=eps)
        )
        return out, total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Notes `kernels.reference.layer_norm`."""
        source = self._rows(x)
        out, part = self._make(source.value.rows_of, x.shape[1], dtype=x.dtype)
        inputs = source, NO_MATRIX, self._weight(weight), NO_MATRIX if bias is None else self._weight(bias)
        self.operations.append(Operation(kind=OperationKind.LAYER_NORM, inputs=inputs, outputs=(part,), epsilon=eps))
        return out

    def rotate_and_write(
        self, query: Tensor, kv: tuple[Tensor, Tensor], rotation: Rotation, *, pages: Tensor, layer: int, slots: Tensor
    ) -> Tensor:
        """Notes `kernels.reference.rotate_and_write`."""
        is_of_batch = _is(rotation.positions, self.batch.positions) and _is(slots, self.batch.slots)
        _require(
            is_of_batch and pages is self.pages, "keys go by the batch's positions and slots into the step's pages"
        )
        heads = query.dtype, kv[0].shape[1], kv[0].shape[2]
        is_same = all(tensor.dtype == query.dtype for tensor in kv) and self.heads in (None, heads)
        _require(is_same, "queries, keys and values have one dtype, and all layers the same pages")
        self.heads = heads
        inputs = self.part(query), self.part(kv[0]), self.part(kv[1])
        _require(all(part.value.rows_of is RowsOf.TOKENS for part in inputs), "every token has a key and a value")
        tables = rotation.cosines.contiguous(), rotation.sines.contiguous()
        out, part = self._make(RowsOf.TOKENS, *query.shape[1:], dtype=query.dtype)
        self.operations.append(
            Operation(kind=OperationKind.ROTATE_AND_WRITE, inputs=inputs, outputs=(part,), layer=layer, tables=tables)
        )
        return out

    def paged_attention(
        self,
        query: Tensor,
        pages: Tensor,
        spans: Spans,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """Notes `kernels.reference.paged_attention`."""
        expected = self.batch.spans
        is_of_batch = _is(spans.query_starts, expected.query_starts) and _is(spans.context_lens, expected.context_lens)
        is_of_batch &= _is(spans.block_tables, expected.block_tables) and pages is self.pages
        _require(is_of_batch, "attention is over the batch's spans and the step's pages")
        source = self.part(query)
        _require(source.value.rows_of is RowsOf.TOKENS, "every token has a query")
        out, part = self._make(RowsOf.TOKENS, *query.shape[1:], dtype=query.dtype)
        operation = Operation(
            kind=OperationKind.PAGED_ATTENTION,
            inputs=(source,),
            outputs=(part,),
            layer=layer,
            num_heads=query.shape[1],
            scale=scale,
            window=window or 0,
            soft_cap=soft_cap or 0.0,
        )
        self.operations.append(operation)
        return out

    def part(self, tensor: Tensor) -> Part:
        """Which columns of which value it is. tensor: [rows, columns], or [rows, heads, D] with heads side by side."""
        made = self._values.get(tensor.untyped_storage().data_ptr())
        if made is None or tensor.dtype != made[0].dtype:
            raise ValueError("a step cannot be recorded: a tensor was not made by one of its operations")
        value = made[0]
        row_strides = {2: (value.columns, 1), 3: (value.columns, tensor.shape[-1], 1)}.get(tensor.dim())
        is_all_rows = len(tensor) == _NUM_ROWS[value.rows_of]
        _require(is_all_rows and tensor.stride() == row_strides, "an operation reads columns, of all rows of a value")
        columns, offset = prod(tensor.shape[1:]), tensor.storage_offset() * value.dtype.itemsize
        return Part(value, Matrix(offset, 0, columns, value.columns, DTYPES[value.dtype]))

    def _rows(self, x: Tensor) -> Part:
        """The part that is an operation's x: [rows, columns]."""
        _require(x.dim() == 2, f"x has shape {list(x.shape)}, the operation takes [rows, columns]")
        return self.part(x)

    def _make(self, rows_of: RowsOf, *shape: int, dtype: torch.dtype) -> tuple[Tensor, Part]:
        """A value that the operation being noted makes, as a tensor for the definition and as an output."""
        tensor, value = torch.empty(_NUM_ROWS[rows_of], *shape, dtype=dtype), Value(rows_of, prod(shape), dtype)
        self._values[tensor.untyped_storage().data_ptr()] = value, tensor
        return tensor, self.part(tensor)

    def _weight(self, tensor: Tensor) -> Matrix:
        """A tensor that is the same in every step. It is kept."""
        _require(tensor.untyped_storage().data_ptr() not in self._values, "a weight is made by an operation")
        self.keep.append(kept := rows(tensor))
        return matrix(kept)

    def _residual(self, tensor: Tensor | None, out: Part) -> Part | Matrix:
        if tensor is None:
            return NO_MATRIX
        part = self.part(tensor)
        is_same = (part.value.rows_of, part.value.dtype) == (out.value.rows_of, out.value.dtype)
        _require(
            is_same and part.matrix.columns == out.matrix.columns, "a residual has the shape and dtype of the result"
        )
        return part


def _is(tensor: Tensor, part: Tensor) -> bool:
    """Whether it is that part of the stand-in's numbers."""
    return (tensor.data_ptr(), tensor.shape) == (part.data_ptr(), part.shape)


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(f"a step cannot be recorded: {otherwise}")
