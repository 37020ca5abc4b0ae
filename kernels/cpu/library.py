"""The kernels' shared library through ctypes: its structures and functions as `src/abi.h` declares them.

Calls release the GIL. Loading starts no thread and is safe before a fork. Structures hold addresses, not tensors: who
makes one keeps the tensors alive until the call returns.
"""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import BackendUnavailableError
from kernels.cpu import LIBRARY_PATH

ABI_VERSION = 5
MAX_GROUP = 96
"""Query heads that may share a KV head."""
MAX_RESULTS = 2
"""Tensors that a step may return."""

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class InstructionSet(IntEnum):
    """Which machine code computes. The bits are the same for all, but that the last takes subnormal numbers as 0."""

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2
    AVX512BF16 = 3


class WeightKind(IntEnum):
    """How a packed weight is stored."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT8_ONLY = 3
    INT4 = 4


class Status(IntEnum):
    """What a function that can refuse returns."""

    OK = 0
    OUT_OF_RANGE = 1
    UNSUPPORTED = 2
    OUT_OF_MEMORY = 3
    NO_THREADS = 4
    NOT_RUN = 5


NOT_BEGUN = -2
"""In place of a status: a step's turn has not come."""


class OperationKind(IntEnum):
    """What an operation of a step computes."""

    TAKE_ROWS = 0
    LINEAR = 1
    RMS_NORM = 2
    LAYER_NORM = 3
    ROTATE_AND_WRITE = 4
    PAGED_ATTENTION = 5


class RowsOf(IntEnum):
    """What a matrix of a step has a row for."""

    TOKENS = 0
    DRAWN = 1
    SCORED = 2


class Home(IntEnum):
    """Where a matrix of a step is: an address for good, the call's scratch memory, a result of the call."""

    FIXED = 0
    SCRATCH = 1
    RESULT = 2


class Matrix(Structure):
    """A tensor seen as rows; the last dimension is contiguous, the stride counts elements."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("dtype", c_int32),
    )


class PackedWeight(Structure):
    """See `abi.h`."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kind", c_int32),
        ("gated", c_int32),
    )


class Screen(Structure):
    """See `abi.h`."""

    _fields_ = (("coarse", PackedWeight), ("errors", c_void_p), ("num_unasked", c_void_p))


class Pages(Structure):
    """See `abi.h`."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("num_blocks", "num_kv_heads", "block_size", "head_dim")),
        *((name, c_int64) for name in ("block_stride", "head_stride", "value_stride", "token_stride")),
        ("dtype", c_int32),
    )


class AttentionArguments(Structure):
    """See `abi.h`."""

    _fields_ = (
        ("query", c_void_p),
        ("out", c_void_p),
        *((name, c_int64) for name in ("num_heads", "query_token_stride", "query_head_stride")),
        ("dtype", c_int32),
        *((name, c_int64) for name in ("num_sequences", "max_blocks", "table_stride")),
        *((name, c_void_p) for name in ("query_starts", "context_lens", "block_tables")),
        ("scale", c_float),
        ("window", c_int64),
        ("soft_cap", c_float),
    )


class RotateArguments(Structure):
    """See `abi.h`."""

    _fields_ = (
        *((name, Matrix) for name in ("query", "keys", "values", "out")),
        *((name, c_void_p) for name in ("cosines", "sines", "positions", "slots")),
    )


class ScoreArguments(Structure):
    """See `abi.h`."""

    _fields_ = (
        ("logits", Matrix),
        ("num_rows", c_int64),
        ("num_top", c_int64),
        *((name, c_void_p) for name in ("rows", "targets", "logprobs", "top_ids", "top_logprobs")),
    )


class Operand(Structure):
    """See `step.h`."""

    _fields_ = (
        ("matrix", Matrix),
        ("home", c_int32),
        ("rows_of", c_int32),
        ("result", c_int64),
        ("before", c_int64 * len(RowsOf)),
    )


class StepOperation(Structure):
    """See `step.h`."""

    _fields_ = (
        ("kind", c_int32),
        *((name, c_float) for name in ("epsilon", "scale", "soft_cap")),
        *((name, c_int64) for name in ("layer", "num_heads", "num_positions", "window")),
        ("inputs", Operand * 4),
        ("outputs", Operand * 2),
        ("weight", PackedWeight),
        ("screen", Screen),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class StepProgram(Structure):
    """See `step.h`."""

    _fields_ = (("operations", POINTER(StepOperation)), ("num_operations", c_int64))


class StepCall(Structure):
    """See `step.h`."""

    _fields_ = (
        ("numbers", c_void_p),
        ("num_rows", c_int64 * len(RowsOf)),
        ("num_sequences", c_int64),
        ("max_blocks", c_int64),
        ("pages", Pages),
        ("layer_stride", c_int64),
        ("scratch", c_void_p),
        ("results", c_void_p * MAX_RESULTS),
    )


class Errand(Structure):
    """See `team.h`."""

    _fields_ = (("work", c_void_p), ("is_done", c_int32), ("driver", c_void_p))


class StepJob(Structure):
    """See `step.h`."""

    _fields_ = (
        ("errand", Errand),
        *((name, c_int32) for name in ("is_unwanted", "status", "set", "threads")),
        ("program", POINTER(StepProgram)),
        ("call", POINTER(StepCall)),
        ("logits", Matrix),
        ("draws", c_char_p),
        ("num_draws", c_int64),
        ("drawn_ids", c_char_p),
        *((name, c_void_p) for name in ("tokens", "before", "sources", "token_ids", "num_holds")),
        ("num_holds_known", c_int32),
    )


_MATRIX = POINTER(Matrix)
_CALL = (c_int32, c_int32)  # instruction set, threads
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "abi_version": (c_int32, ()),
    "instruction_set": (c_int32, ()),
    "packed_bytes": (c_int64, (c_int32, c_int64, c_int64)),
    "pack": (c_int32, (c_int32, _MATRIX, c_void_p, c_void_p, c_void_p, c_int32)),
    "linear": (c_int32, (*_CALL, POINTER(PackedWeight), _MATRIX, _MATRIX, _MATRIX)),
    "largest": (c_int32, (*_CALL, POINTER(PackedWeight), POINTER(Screen), _MATRIX, _MATRIX)),
    "attention": (c_int32, (*_CALL, POINTER(AttentionArguments), POINTER(Pages))),
    "rms_norm": (c_int32, (*_CALL, _MATRIX, _MATRIX, _MATRIX, c_float, _MATRIX, _MATRIX)),
    "layer_norm": (c_int32, (*_CALL, _MATRIX, _MATRIX, _MATRIX, _MATRIX, c_float, _MATRIX, _MATRIX)),
    "rotate_and_write": (c_int32, (*_CALL, POINTER(RotateArguments), POINTER(Pages), c_int64)),
    "step": (c_int32, (*_CALL, POINTER(StepProgram), POINTER(StepCall))),
    "step_job_bytes": (c_int64, ()),
    "step_operation_bytes": (c_int64, ()),
    "step_begin": (c_int32, (POINTER(StepJob),)),
    "step_finish": (c_int32, (POINTER(StepJob),)),
    "log_softmax": (c_int32, (*_CALL, _MATRIX, _MATRIX)),
    "sample": (c_int32, (*_CALL, _MATRIX, c_void_p, c_int64, c_void_p, c_void_p)),
    "score_tokens": (c_int32, (*_CALL, POINTER(ScoreArguments))),
    "embedding": (c_int32, (c_void_p, _MATRIX, _MATRIX)),
}

NO_MATRIX = Matrix()


def load(path: Path = LIBRARY_PATH) -> ctypes.CDLL:
    """Loads the library. Raises BackendUnavailableError when it is not built, or not for this code and machine."""
    if not path.exists():
        raise BackendUnavailableError(f"the CPU kernels are not built ({path.name} is missing): run `make setup`")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"the CPU kernels ({path.name}) cannot be loaded: run `make setup`") from error
    if (version := library.staffetta_abi_version()) != ABI_VERSION:
        raise BackendUnavailableError(f"the CPU kernels have version {version}, not {ABI_VERSION}: run `make setup`")
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, f"staffetta_{name}")
        except AttributeError as error:
            raise BackendUnavailableError(f"the CPU kernels have no {name}, they are old: run `make setup`") from error
        function.restype, function.argtypes = result, arguments
    sizes = library.staffetta_step_job_bytes(), library.staffetta_step_operation_bytes()
    if sizes != (ctypes.sizeof(StepJob), ctypes.sizeof(StepOperation)):
        raise BackendUnavailableError("the CPU kernels have another layout of a step, they are old: run `make setup`")
    return library


def matrix(tensor: Tensor) -> Matrix:
    """A tensor [rows, columns], or [columns] as one row. Its last dimension must be contiguous (see `rows`)."""
    if tensor.dim() == 1:
        return Matrix(tensor.data_ptr(), 1, tensor.shape[0], tensor.shape[0], DTYPES[tensor.dtype])
    return Matrix(tensor.data_ptr(), tensor.shape[0], tensor.shape[1], tensor.stride(0), DTYPES[tensor.dtype])


def pages_of_layer(pages: Tensor, layer: int) -> Pages:
    """Where one layer's keys and values are. pages: [num_blocks, KVH, L, 2, BS, D]; each last dimension contiguous."""
    num_blocks, num_kv_heads, _, _, block_size, head_dim = pages.shape
    by_block, by_head, _, by_value, by_token, _ = pages.stride()
    return Pages(
        pages[:, :, layer].data_ptr(),
        num_blocks,
        num_kv_heads,
        block_size,
        head_dim,
        by_block,
        by_head,
        by_value,
        by_token,
        DTYPES[pages.dtype],
    )


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check(status: int, *, out_of_range: str, unsupported: str = "") -> None:
    """Turns a status into an exception: IndexError or ValueError with the caller's words, MemoryError, RuntimeError."""
    if status == Status.OUT_OF_RANGE:
        raise IndexError(out_of_range)
    if status == Status.UNSUPPORTED:
        raise ValueError(unsupported)
    if status == Status.OUT_OF_MEMORY:
        raise MemoryError("no memory for the kernels' scratch space")
    if status == Status.NO_THREADS:
        raise RuntimeError("the system starts no more threads: raise its limit (ulimit -u) or compute with fewer")
