"""The numerics contract of the kernels: a row's bits depend on the row alone.

Not on how many rows are computed with it, how a prompt is cut into chunks, on threads or on the instruction set.
Comparisons are of bits: `torch.equal` on tensors without NaN.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.backend import Rotation, Spans, WeightFormat
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import InstructionSet
from kernels.rope import Rope

MAX_ROWS = 300
FEW_ROWS = (2, 3, 4, 11, 12, 13, 25, 64, 97, 300)
SHAPES = {"small": (37, 45), "blocked": (1027, 161)}  # K over several cache blocks; neither a multiple of anything


class Stored(NamedTuple):
    dtype: torch.dtype
    format: WeightFormat
    result: torch.dtype | None = None


STORED = {
    "float32": Stored(torch.float32, WeightFormat.AS_GIVEN),
    "bfloat16": Stored(torch.bfloat16, WeightFormat.AS_GIVEN),
    "bfloat16-to-float32": Stored(torch.bfloat16, WeightFormat.AS_GIVEN, torch.float32),
    "int8": Stored(torch.float32, WeightFormat.INT8),
    "int8-weight": Stored(torch.float32, WeightFormat.INT8_WEIGHT),
    "int8-weight-bfloat16": Stored(torch.bfloat16, WeightFormat.INT8_WEIGHT),
    "int4": Stored(torch.float32, WeightFormat.INT4),
    "int4-bfloat16": Stored(torch.bfloat16, WeightFormat.INT4),
}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rows_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(actual, expected):
        row = int((actual != expected).flatten(1).any(dim=1).nonzero()[0])
        raise AssertionError(
            f"{what}: row {row} has other bits, {actual[row].flatten()[:4]} {expected[row].flatten()[:4]}"
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", STORED)
def test_a_row_of_a_linear_layer_is_the_same_at_every_number_of_rows(
    backend: CpuBackend, alone: CpuBackend, stored: str, shape: str, is_full: bool
) -> None:
    inputs, outputs = SHAPES[shape]
    dtype, weight_format, result = STORED[stored]
    weight, bias = numbers(outputs, inputs, seed=1, dtype=dtype), numbers(outputs, seed=2, dtype=dtype)
    # Rows of different sizes: a scale taken over several of them shows.
    x = (numbers(MAX_ROWS, inputs, seed=3) * torch.linspace(0.01, 3, MAX_ROWS)[:, None]).to(dtype)
    residual = numbers(MAX_ROWS, outputs, seed=4, dtype=result or dtype)
    one = alone.prepare_linear(weight, bias, stored=weight_format)
    expected = torch.cat([one(x[m : m + 1], residual=residual[m : m + 1], dtype=result) for m in range(MAX_ROWS)])
    layer = backend.prepare_linear(weight, bias, stored=weight_format)
    every = is_full or (backend.isa is alone.isa and (backend.threads == 2 or shape == "small"))
    for count in range(1, MAX_ROWS + 1) if every else FEW_ROWS:
        first = layer(x[:count], residual=residual[:count], dtype=result)
        assert_rows_equal(first, expected[:count], f"first {count} rows")
    last = layer(x[-77:], residual=residual[-77:], dtype=result)
    assert_rows_equal(last, expected[-77:], "last 77 rows")


@pytest.mark.parametrize("stored", STORED)
def test_a_gated_row_is_the_same_at_every_number_of_rows(backend: CpuBackend, alone: CpuBackend, stored: str) -> None:
    dtype, weight_format, result = STORED[stored]
    halves = [(numbers(53, 419, seed=seed, dtype=dtype), None) for seed in (5, 6)]
    x = numbers(64, 419, seed=7, dtype=dtype)
    one = alone.prepare_gated_linear(halves[0], halves[1], stored=weight_format)
    expected = torch.cat([one(row[None], dtype=result) for row in x])
    layer = backend.prepare_gated_linear(halves[0], halves[1], stored=weight_format)
    for count in (1, 2, 13, 64):
        assert_rows_equal(layer(x[:count], dtype=result), expected[:count], f"{count} rows")


@pytest.mark.parametrize("stored", STORED)
def test_a_row_of_a_linear_layer_over_many_inputs_is_the_same(
    backend: CpuBackend, alone: CpuBackend, stored: str
) -> None:
    # More inputs than any format computes without storing sums: alone a row does, together rows do not.
    dtype, weight_format, result = STORED[stored]
    weight, x = numbers(33, 16_500, seed=16, dtype=dtype), numbers(26, 16_500, seed=17, dtype=dtype)
    one = alone.prepare_linear(weight, stored=weight_format)
    expected = torch.cat([one(row[None], dtype=result) for row in x])
    layer = backend.prepare_linear(weight, stored=weight_format)
    for count in (1, 13, 26):
        assert_rows_equal(layer(x[:count], dtype=result), expected[:count], f"{count} rows")


class Context:
    """One sequence's pages, keys, values and queries for every position, over shuffled blocks; NaN where none wrote."""

    def __init__(
        self, length: int, *, dim: int, heads: int = 4, kv_heads: int = 2, block_size: int = 16, dtype: torch.dtype
    ) -> None:
        self.length, self.scale = length, dim**-0.5
        num_blocks = -(-length // block_size)
        generator = torch.Generator().manual_seed(length)
        self.table = torch.randperm(num_blocks + 2, generator=generator)[:num_blocks]
        self.pages = torch.full((num_blocks + 2, kv_heads, 2, 2, block_size, dim), torch.nan, dtype=dtype)
        by_slot = self.pages[:, :, 1].permute(0, 3, 2, 1, 4)  # [num_blocks, block_size, 2, kv_heads, dim]
        positions = torch.arange(length)
        blocks = self.table[positions // block_size]
        by_slot[blocks, positions % block_size] = numbers(length, 2, kv_heads, dim, seed=8).to(dtype)
        self.queries = (numbers(length, heads, dim, seed=9) * 2).to(dtype)

    def attend(
        self, backend: CpuBackend, start: int, end: int, *, window: int | None = None, soft_cap: float | None = None
    ) -> Tensor:
        """Rows [start, end) as one chunk, given no more of the sequence than its end."""
        spans = Spans(torch.tensor([0, end - start]), torch.tensor([end]), self.table[None])
        return backend.paged_attention(
            self.queries[start:end], self.pages, spans, layer=1, scale=self.scale, window=window, soft_cap=soft_cap
        )

    def decode(self, backend: CpuBackend, *, window: int | None = None, soft_cap: float | None = None) -> Tensor:
        """Every row by itself."""
        rows = [self.attend(backend, p, p + 1, window=window, soft_cap=soft_cap) for p in range(self.length)]
        return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_prefill_and_every_chunk_size_attend_alike(
    backend: CpuBackend, alone: CpuBackend, dtype: torch.dtype, is_full: bool
) -> None:
    context = Context(203, dim=24, dtype=dtype)
    expected = context.decode(alone)
    assert_rows_equal(context.attend(backend, 0, context.length), expected, "prefill")
    every = is_full or (dtype is torch.float32 and backend.isa is alone.isa and backend.threads == 2)
    for size in range(1, 131) if every else (1, 5, 64, 65, 130):
        for start in range(0, context.length, size):
            end = min(start + size, context.length)
            assert_rows_equal(context.attend(backend, start, end), expected[start:end], f"chunk [{start}, {end})")


@pytest.mark.parametrize(
    ("window", "soft_cap"), [(1, None), (50, None), (64, None), (100, 5.0), (None, 5.0), (9999, None)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_and_soft_caps_attend_alike(
    backend: CpuBackend, alone: CpuBackend, dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    context = Context(203, dim=40, dtype=dtype, kv_heads=1)
    expected = context.decode(alone, window=window, soft_cap=soft_cap)
    for size in (203, 130, 64, 17):
        for start in range(0, context.length, size):
            end = min(start + size, context.length)
            actual = context.attend(backend, start, end, window=window, soft_cap=soft_cap)
            assert_rows_equal(actual, expected[start:end], f"chunk [{start}, {end})")
    if window == 9999:
        assert_rows_equal(context.attend(backend, 0, 203), expected, "a window over everything is none")


@pytest.mark.parametrize("block_size", [5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_row_does_not_see_cannot_reach_it(backend: CpuBackend, dtype: torch.dtype, block_size: int) -> None:
    # Positions are used in pairs: a row that sees one of a pair must not be reached by the other, even if it is NaN.
    for position in (64, 101):
        context = Context(150, dim=32, block_size=block_size, dtype=dtype)
        expected = {window: context.attend(backend, 0, 150, window=window) for window in (None, 21)}
        context.pages[context.table[position // block_size], :, 1, :, position % block_size] = torch.nan
        for window, end in ((None, 150), (21, position + 21)):
            actual = context.attend(backend, 0, 150, window=window)
            assert_rows_equal(actual[:position], expected[window][:position], f"before {position}")
            assert actual[position:end].isnan().all()
            assert_rows_equal(actual[end:], expected[window][end:], f"a window after {position}")


@pytest.mark.parametrize("dim", [16, 32, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_block_size_attends_alike(backend: CpuBackend, alone: CpuBackend, dtype: torch.dtype, dim: int) -> None:
    # Blocks of 16 k positions are read where they lie, others are widened first.
    expected = Context(150, dim=dim, block_size=5, dtype=dtype).attend(alone, 0, 150)
    for block_size in (1, 5, 16, 48, 64, 256):
        context = Context(150, dim=dim, block_size=block_size, dtype=dtype)
        assert_rows_equal(context.attend(backend, 0, 150), expected, f"prefill over blocks of {block_size}")
        for position in (0, 15, 63, 64, 149):
            decoded = context.attend(backend, position, position + 1)
            assert_rows_equal(decoded, expected[position : position + 1], f"{position} over blocks of {block_size}")


@pytest.mark.parametrize("window", [None, 1500], ids=str)
def test_contexts_of_several_splits_attend_alike(backend: CpuBackend, alone: CpuBackend, window: int | None) -> None:
    context = Context(3100, dim=16, heads=3, kv_heads=1, dtype=torch.float32)
    whole = context.attend(alone, 0, context.length, window=window)
    for position in (0, 1, 63, 64, 1023, 1024, 1025, 2047, 2048, 2500, 3099):
        decoded = context.attend(backend, position, position + 1, window=window)
        assert_rows_equal(decoded, whole[position : position + 1], f"decode at {position}")
    for start, end in ((0, 1100), (1000, 2100), (2040, 3100)):
        actual = context.attend(backend, start, end, window=window)
        assert_rows_equal(actual, whole[start:end], f"chunk [{start}, {end})")


def test_a_sequence_attends_alike_among_others(backend: CpuBackend, alone: CpuBackend) -> None:
    context = Context(150, dim=24, dtype=torch.float32)
    expected = context.decode(alone)
    ends, counts = [150, 1, 70, 149, 65], [1, 1, 70, 20, 1]
    rows = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    spans = Spans(
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]), torch.tensor(ends), context.table.expand(5, -1)
    )
    queries = torch.cat([context.queries[span.start : span.stop] for span in rows])
    together = backend.paged_attention(queries, context.pages, spans, layer=1, scale=context.scale)
    assert_rows_equal(together, torch.cat([expected[span.start : span.stop] for span in rows]), "five sequences")


@pytest.mark.parametrize("hidden", [7, 133, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_have_one_tree(backend: CpuBackend, alone: CpuBackend, dtype: torch.dtype, hidden: int) -> None:
    x, residual = (numbers(150, hidden, seed=seed, dtype=dtype) for seed in (10, 11))
    weight, bias = (numbers(hidden, seed=seed, dtype=dtype) for seed in (12, 13))
    normed, total = backend.add_rms_norm(x, residual, weight, 1e-5)
    centred = backend.layer_norm(x, weight, bias, 1e-5)
    for row in range(0, 150, 7):
        at = slice(row, row + 1)
        expected, expected_total = alone.add_rms_norm(x[at], residual[at], weight, 1e-5)
        assert_rows_equal(normed[at], expected, f"rms norm of row {row}")
        assert_rows_equal(total[at], expected_total, f"sum of row {row}")
        assert_rows_equal(backend.rms_norm(total, weight, 1e-5)[at], expected, f"rms norm of sum {row}")
        assert_rows_equal(centred[at], alone.layer_norm(x[at], weight, bias, 1e-5), f"layer norm of row {row}")


@pytest.mark.parametrize("vocab_size", [3, 4096, 32_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_softmax_has_one_tree(backend: CpuBackend, alone: CpuBackend, dtype: torch.dtype, vocab_size: int) -> None:
    logits = (numbers(5, vocab_size, seed=14) * 4).to(dtype)
    together = backend.log_softmax(logits)
    for row in range(5):
        assert_rows_equal(together[row : row + 1], alone.log_softmax(logits[row : row + 1]), f"row {row}")


def test_rotation_and_its_write_turn_rows_alike(backend: CpuBackend, alone: CpuBackend) -> None:
    tables = alone.rope_tables(Rope(10_000.0), head_dim=34, num_positions=400)
    query, keys, values = (numbers(300, heads, 34, seed=15 + heads) for heads in (8, 2, 2))
    pages = [torch.zeros(20, 2, 1, 2, 16, 34) for _ in range(2)]
    positions, slots = torch.arange(300) + 77, torch.randperm(320, generator=torch.Generator().manual_seed(4))[:300]
    turned = backend.rotate_and_write(
        query, (keys, values), Rotation(*tables, positions), pages=pages[0], layer=0, slots=slots
    )
    for row in range(300):
        at = slice(row, row + 1)
        rotation = Rotation(*tables, positions[at])
        kv = keys[at], values[at]
        expected = alone.rotate_and_write(query[at], kv, rotation, pages=pages[1], layer=0, slots=slots[at])
        assert_rows_equal(turned[at], expected, f"row {row}")
    assert_rows_equal(pages[0], pages[1], "pages")


def test_instruction_sets_are_not_one_and_the_same(backend: CpuBackend) -> None:
    assert backend.isa in InstructionSet
    assert backend.name == f"cpu ({backend.isa.name.lower()})"
