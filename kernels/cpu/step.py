"""A model's layers as one call of the compiled kernels: descriptors made once, addresses and row counts each time.

It computes nothing itself and knows no architecture: the program is a recording of the model's definition.
"""

from collections import defaultdict
from collections.abc import Mapping
from ctypes import byref
from operator import mul
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.backend import Batch, Definition
from kernels.cpu import library as abi
from kernels.cpu.library import Home, Matrix, RowsOf, pages_of_layer
from kernels.cpu.record import Operation, Part, Recording, Value, record

if TYPE_CHECKING:
    from kernels.cpu.backend import CpuBackend

_ALIGNMENT = 64
"""Bytes of a cache line: every value in scratch memory begins with one."""

_Before = tuple[int, ...]
"""A place in scratch memory: the bytes before it for each row of each kind, in the order of `RowsOf`."""


class CompiledStep:
    """A definition as a program in memory, with memory for its values. One thread at a time.

    `scratch_row_bytes` is how much of it a row of each kind takes, in the order of `RowsOf`.
    """

    def __init__(self, backend: "CpuBackend", definition: Definition) -> None:
        """Records `definition`. Raises ValueError or TypeError for one that cannot be recorded."""
        self._backend = backend
        self._definition = definition
        self._recording = record(definition)  # owns the weights that the program points to
        places, self.scratch_row_bytes = _place(self._recording)
        operations = [_describe(operation, places, self._recording) for operation in self._recording.operations]
        self._operations = (abi.StepOperation * len(operations))(*operations)
        self._program = abi.StepProgram(self._operations, len(operations))
        self._call = abi.StepCall()
        self._pages: Tensor | None = None  # those that the call describes
        self._num_rows: tuple[int, ...] = ()  # those that the call has room for, by kind
        self._results: tuple[Tensor, ...] = ()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_bytes = 0  # as many as the largest step so far needed

    def __call__(self, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        """Computes a step; contract and exceptions are those of the definition on the backend's own operations.

        What it returns is overwritten by the next step of as many rows. Torch is left alone in such a step: after one
        that has filled the caches with weights, the first use of each of its functions costs some 50 us.
        """
        call, backend = self._call, self._backend
        if pages is not self._pages:
            self._describe_pages(pages)
        num_rows = batch.num_tokens, batch.num_drawn, batch.num_scored
        if num_rows != self._num_rows:
            self._make_room(num_rows)
        call.numbers, _ = batch.numbers.buffer_info()
        call.num_sequences, call.max_blocks = batch.num_sequences, batch.max_blocks
        if backend.library.staffetta_step(backend.isa, backend.threads, byref(self._program), byref(call)):
            # Once more, one by one, which writes the same bytes: the operation that refuses says what is wrong.
            return self._definition(backend, batch, pages)
        return self._results

    def _make_room(self, num_rows: tuple[int, ...]) -> None:
        """Makes the call one of so many rows of each kind, with scratch memory and results of its own."""
        self._num_rows = ()
        num_bytes = sum(map(mul, num_rows, self.scratch_row_bytes))
        if num_bytes > self._scratch_bytes:
            self._scratch, self._scratch_bytes = torch.empty(num_bytes, dtype=torch.uint8), num_bytes
            self._call.scratch = self._scratch.data_ptr()
        self._results = tuple(
            torch.empty(num_rows[value.rows_of], value.columns, dtype=value.dtype) for value in self._recording.results
        )
        for number, result in enumerate(self._results):
            self._call.results[number] = result.data_ptr()
        self._call.num_rows[:] = num_rows
        self._num_rows = num_rows

    def _describe_pages(self, pages: Tensor) -> None:
        """Makes the call one over `pages`. Raises ValueError when the recorded operations do not fit them."""
        shape = self._recording.page_shape
        if shape is not None:
            num_layers, head_dim = pages.shape[2], pages.shape[5]
            if (pages.dtype, pages.shape[1], head_dim) != shape[:3] or num_layers < shape.num_layers:
                raise ValueError(f"pages are {pages.dtype} {list(pages.shape)}, the model writes {shape}")
            if pages.stride(5) != 1:
                raise ValueError("the numbers of a key or value are not side by side in the pages")
            self._call.pages, self._call.layer_stride = pages_of_layer(pages, 0), pages.stride(2)
        self._pages = pages


def _place(recording: Recording) -> tuple[Mapping[Value, _Before], _Before]:
    """Gives every value but the result its place in scratch memory; returns the places, and where the memory ends.

    A value takes the place of another of its kind and size that nothing later reads, if there is one. What an operation
    reads stays where it is until the operation is done.
    """
    last_use = {part.value: number for number, each in enumerate(recording.operations) for part in each.parts}
    places: dict[Value, _Before] = {}
    left: defaultdict[tuple[RowsOf, int], list[_Before]] = defaultdict(list)
    end = [0] * len(RowsOf)
    for number, operation in enumerate(recording.operations):
        for value in (part.value for part in operation.outputs if part.value not in recording.results):
            size = value.rows_of, _aligned(value.row_bytes)
            if left[size]:
                places[value] = left[size].pop()
            else:
                places[value] = tuple(end)
                end[value.rows_of] += _aligned(value.row_bytes)
        for value in dict.fromkeys(part.value for part in operation.parts if part.value not in recording.results):
            if last_use[value] == number:
                left[value.rows_of, _aligned(value.row_bytes)].append(places[value])
    return places, tuple(end)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _describe(operation: Operation, places: Mapping[Value, _Before], recording: Recording) -> abi.StepOperation:
    """The operation for `src/step.h`. It holds addresses: the recording keeps what is there."""

    def operand(argument: Part | Matrix) -> abi.Operand:
        if isinstance(argument, Matrix):
            return abi.Operand(argument, Home.FIXED)
        value = argument.value
        if value in recording.results:
            return abi.Operand(argument.matrix, Home.RESULT, value.rows_of, result=recording.results.index(value))
        return abi.Operand(argument.matrix, Home.SCRATCH, value.rows_of, before=places[value])

    described = abi.StepOperation(
        kind=operation.kind,
        inputs=tuple(map(operand, operation.inputs)),
        outputs=tuple(map(operand, operation.outputs)),
        weight=operation.weight,
        epsilon=operation.epsilon,
        scale=operation.scale,
        soft_cap=operation.soft_cap,
        window=operation.window,
        layer=operation.layer,
        num_heads=operation.num_heads,
    )
    if operation.tables is not None:
        cosines, sines = operation.tables
        described.cosines, described.sines, described.num_positions = cosines.data_ptr(), sines.data_ptr(), len(cosines)
    return described
