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


class Program:
    """A definition's operations in memory, for any number of calls.

    `scratch_row_bytes` is how much scratch memory a row of each kind takes, in the order of `RowsOf`.
    """

    def __init__(self, definition: Definition) -> None:
        """Records `definition`. Raises ValueError or TypeError for one that cannot be recorded."""
        self.recording = record(definition)  # owns the weights that the program points to
        places, self.scratch_row_bytes = _place(self.recording)
        operations = [_describe(operation, places, self.recording) for operation in self.recording.operations]
        self._operations = (abi.StepOperation * len(operations))(*operations)
        self.description = abi.StepProgram(self._operations, len(operations))


class PreparedCall:
    """One call of a program, with memory for its values, made once and changed for each step.

    `results` are overwritten by the next step of as many rows.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.description = abi.StepCall()
        self.results: tuple[Tensor, ...] = ()
        self._pages: Tensor | None = None  # those that the call describes
        self._num_rows: tuple[int, ...] = ()  # those that the call has room for, by kind
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_bytes = 0  # as many as the largest step so far needed

    def prepare(self, batch: Batch, pages: Tensor) -> None:
        """Makes it the call for a step. Raises ValueError when the recorded operations do not fit the pages.

        Torch is left alone for a step of as many rows as the last: after one that has filled the caches with weights,
        the first use of each of its functions costs some 50 us.
        """
        call = self.description
        if pages is not self._pages:
            self._describe_pages(pages)
        num_rows = batch.num_tokens, batch.num_drawn, batch.num_scored
        if num_rows != self._num_rows:
            self._make_room(num_rows)
        call.numbers, _ = batch.numbers.buffer_info()
        call.num_sequences, call.max_blocks = batch.num_sequences, batch.max_blocks

    def _make_room(self, num_rows: tuple[int, ...]) -> None:
        """Makes the call one of so many rows of each kind, with scratch memory and results of its own."""
        self._num_rows = ()
        num_bytes = sum(map(mul, num_rows, self._program.scratch_row_bytes))
        if num_bytes > self._scratch_bytes:
            self._scratch, self._scratch_bytes = torch.empty(num_bytes, dtype=torch.uint8), num_bytes
            self.description.scratch = self._scratch.data_ptr()
        self.results = tuple(
            torch.empty(num_rows[value.rows_of], value.columns, dtype=value.dtype)
            for value in self._program.recording.results
        )
        for number, result in enumerate(self.results):
            self.description.results[number] = result.data_ptr()
        self.description.num_rows[:] = num_rows
        self._num_rows = num_rows

    def _describe_pages(self, pages: Tensor) -> None:
        """Makes the call one over `pages`. Raises ValueError when the recorded operations do not fit them."""
        shape = self._program.recording.page_shape
        if shape is not None:
            num_layers, head_dim = pages.shape[2], pages.shape[5]
            if (pages.dtype, pages.shape[1], head_dim) != shape[:3] or num_layers < shape.num_layers:
                raise ValueError(f"pages are {pages.dtype} {list(pages.shape)}, the model writes {shape}")
            if pages.stride(5) != 1:
                raise ValueError("the numbers of a key or value are not side by side in the pages")
            self.description.pages, self.description.layer_stride = pages_of_layer(pages, 0), pages.stride(2)
        self._pages = pages


class CompiledStep:
    """A definition as a program in memory that is run as one call. One thread at a time."""

    def __init__(self, backend: "CpuBackend", definition: Definition) -> None:
        """Records `definition`. Raises ValueError or TypeError for one that cannot be recorded."""
        self._backend = backend
        self._definition = definition
        self._program = Program(definition)
        self._call = PreparedCall(self._program)

    @property
    def scratch_row_bytes(self) -> tuple[int, ...]:
        """Scratch memory that a row of each kind takes, in the order of `RowsOf`."""
        return self._program.scratch_row_bytes

    def __call__(self, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        """Computes a step; contract and exceptions are those of the definition on the backend's own operations.

        What it returns is overwritten by the next step of as many rows.
        """
        backend, call = self._backend, self._call
        call.prepare(batch, pages)
        program, description = byref(self._program.description), byref(call.description)
        if backend.library.staffetta_step(backend.isa, backend.threads, program, description):
            # Once more, one by one, which writes the same bytes: the operation that refuses says what is wrong.
            return self._definition(backend, batch, pages)
        return call.results


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
        screen=operation.screen,
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
