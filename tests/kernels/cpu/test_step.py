"""Recording definitions: every operation repeats its bits, and what could not be repeated is refused."""

import re
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Batch, Definition, Operations, Rotation, Spans, WeightFormat
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import RowsOf
from kernels.cpu.record import record
from kernels.cpu.step import CompiledStep
from kernels.reference import ReferenceBackend
from kernels.rope import Rope

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 48, 6, 2, 8, 50
BLOCK_SIZE, NUM_BLOCKS, NUM_LAYERS = 4, 12, 2
COSINES, SINES = ReferenceBackend.rope_tables(Rope(1e4), head_dim=HEAD_DIM, num_positions=64)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_pages(dtype: torch.dtype = torch.float32, *, num_layers: int = NUM_LAYERS) -> Tensor:
    """Filled: layers that a definition does not write are read as they are."""
    return numbers(NUM_BLOCKS, KV_HEADS, num_layers, 2, BLOCK_SIZE, HEAD_DIM, seed=1, dtype=dtype)


def make_batch(lengths: tuple[int, ...] = (5, 1, 3), contexts: tuple[int, ...] = (5, 9, 7)) -> Batch:
    """Sequences of those query rows and contexts; the last row of each is drawn, the first is scored twice."""
    positions = [p for length, end in zip(lengths, contexts, strict=True) for p in range(end - length, end)]
    owners = [index for index, length in enumerate(lengths) for _ in range(length)]
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    tables = [[3 * index + block for block in range(3)] for index in range(len(lengths))]
    slots = [tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in zip(owners, positions, strict=True)]
    token_ids = [(7 * position + 3) % VOCABULARY for position in positions]
    parts = [token_ids, positions, slots, starts, contexts, *tables, [start - 1 for start in starts[1:]], [0, 0]]
    return Batch(
        array("q", [number for part in parts for number in part]),
        num_tokens=len(positions),
        num_sequences=len(lengths),
        max_blocks=3,
        num_drawn=len(lengths),
        num_scored=2,
    )


def everything(backend: CpuBackend, dtype: torch.dtype, *, stored: WeightFormat) -> Definition:
    """A definition that uses every operation, most of their options, and columns in the middle of a value."""
    table, scale = numbers(VOCABULARY, HIDDEN, seed=2, dtype=dtype), numbers(HIDDEN, seed=3, dtype=dtype)
    bias, heads = numbers(HIDDEN, seed=4, dtype=dtype), HEADS + 2 * KV_HEADS
    qkv = backend.prepare_linear(numbers(heads * HEAD_DIM, HIDDEN, seed=5, dtype=dtype), stored=stored)
    gated = backend.prepare_gated_linear(
        (numbers(HIDDEN, HIDDEN, seed=6, dtype=dtype), bias), (numbers(HIDDEN, HIDDEN, seed=7, dtype=dtype), bias)
    )
    head = backend.prepare_linear(numbers(VOCABULARY, HIDDEN, seed=8, dtype=dtype))

    def define(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        hidden = ops.embedding(batch.token_ids, table)
        normed = ops.layer_norm(ops.layer_norm(hidden, scale, None, 1e-5), scale, bias, 1e-3)
        rows = ops.linear(qkv, normed).view(len(normed), heads, HEAD_DIM)
        query, keys, values = torch.split(rows, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        turned = ops.rotate_and_write(
            query, (keys, values), Rotation(COSINES, SINES, batch.positions), pages=pages, layer=1, slots=batch.slots
        )
        attended = ops.paged_attention(turned, pages, batch.spans, layer=1, scale=0.3, window=4, soft_cap=5.0)
        across = ops.paged_attention(turned, pages, batch.spans, layer=1, scale=0.2)
        normed, total = ops.add_rms_norm(attended.flatten(1), across.flatten(1), scale, 1e-5)
        inner = ops.linear(gated, normed, residual=total)
        drawn, scored = (ops.take_rows(inner, rows) for rows in (batch.drawn_rows, batch.scored_rows))
        return ops.linear(head, ops.rms_norm(drawn, scale, 1e-5), dtype=torch.float32), ops.linear(
            gated, scored, residual=scored
        )

    return define


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stored", WeightFormat, ids=lambda stored: stored.name.lower())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_operation_repeats_its_bits(dtype: torch.dtype, stored: WeightFormat, threads: int) -> None:
    backend = CpuBackend(threads=threads)
    define = everything(backend, dtype, stored=stored)
    compute, pages = backend.compile_step(define), make_pages(dtype)
    written = pages.clone()
    for batch in (make_batch(), make_batch((1,), (12,)), make_batch((10, 2), (10, 11))):
        expected = define(backend, batch, pages)
        for result, tensor in zip(compute(batch, written), expected, strict=True):
            assert result.dtype == tensor.dtype
            assert torch.equal(result, tensor)
    assert torch.equal(pages, written)
    assert not torch.equal(pages, make_pages(dtype))


def test_steps_of_as_many_rows_share_their_results_and_others_do_not() -> None:
    backend = CpuBackend(threads=1)
    define = everything(backend, torch.float32, stored=WeightFormat.AS_GIVEN)
    compute, pages = backend.compile_step(define), make_pages()
    first, again, other = make_batch((1, 1), (3, 5)), make_batch((1, 1), (9, 2)), make_batch((2, 1), (3, 5))
    results = compute(first, pages)
    assert compute(again, pages) is results
    assert all(torch.equal(*pair) for pair in zip(results, define(backend, again, pages), strict=True))
    kept = [result.clone() for result in results]
    others = compute(other, pages)
    assert compute(other, pages) is others  # and not made one by one, as after a refusal
    assert all(torch.equal(*pair) for pair in zip(others, define(backend, other, pages), strict=True))
    assert all(torch.equal(*pair) for pair in zip(results, kept, strict=True))
    assert all(torch.equal(*pair) for pair in zip(compute(first, pages), define(backend, first, pages), strict=True))


def test_pages_may_change_from_call_to_call_and_lie_apart() -> None:
    backend = CpuBackend(threads=1)
    define = everything(backend, torch.float32, stored=WeightFormat.AS_GIVEN)
    compute, batch = backend.compile_step(define), make_batch()
    apart = torch.zeros(NUM_BLOCKS, KV_HEADS + 1, 3, 2, BLOCK_SIZE + 2, HEAD_DIM)[:, 1:, :, :, :BLOCK_SIZE]
    for pages in (make_pages(), make_pages(num_layers=4) * 2, apart):
        expected = define(backend, batch, pages.clone())
        assert all(torch.equal(*pair) for pair in zip(compute(batch, pages), expected, strict=True))


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (make_pages(torch.bfloat16), "pages are torch.bfloat16 [12, 2, 2, 2, 4, 8], the model writes PageShape("),
        (make_pages(num_layers=1), "pages are torch.float32 [12, 2, 1, 2, 4, 8], the model writes"),
        (make_pages()[:, :1], "pages are torch.float32 [12, 1, 2, 2, 4, 8], the model writes"),
        (make_pages()[..., :4], "pages are torch.float32 [12, 2, 2, 2, 4, 4], the model writes"),
        (make_pages().mT.contiguous().mT, "the numbers of a key or value are not side by side in the pages"),
    ],
    ids=["dtype", "layers", "heads", "head_dim", "stride"],
)
def test_pages_of_another_shape_are_refused(pages: Tensor, message: str) -> None:
    backend = CpuBackend(threads=1)
    compute = backend.compile_step(everything(backend, torch.float32, stored=WeightFormat.AS_GIVEN))
    with pytest.raises(ValueError, match=re.escape(message)):
        compute(make_batch(), pages)


def test_weights_live_as_long_as_the_step() -> None:
    backend = CpuBackend(threads=1)
    owners: list[weakref.ref[object]] = []

    def define(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        del pages
        # Made anew each time: but for the recording, nothing would keep them.
        layer, table = backend.prepare_linear(numbers(HIDDEN, HIDDEN, seed=9)), numbers(VOCABULARY, HIDDEN, seed=2)
        owners.extend((weakref.ref(layer), weakref.ref(table)))
        return (ops.linear(layer, ops.embedding(batch.token_ids, table)),)

    compute = backend.compile_step(define)
    assert len(owners) == 2
    assert all(owner() is not None for owner in owners)
    (result,) = compute(make_batch(), torch.zeros(0))
    assert torch.equal(result, define(backend, make_batch(), torch.zeros(0))[0])
    del compute
    assert all(owner() is None for owner in owners)


def test_values_share_scratch_memory_when_nothing_reads_them_any_more() -> None:
    backend = CpuBackend(threads=1)
    layer = backend.prepare_linear(numbers(HIDDEN, HIDDEN, seed=9))

    def layers(count: int) -> Definition:
        def define(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
            del pages
            hidden = ops.embedding(batch.token_ids, numbers(VOCABULARY, HIDDEN, seed=2))
            for _ in range(count):
                hidden = ops.linear(layer, hidden, residual=hidden)
            return (ops.take_rows(hidden, batch.drawn_rows),)

        return define

    # Two of 48 float32, which take turns; the result lies elsewhere.
    assert CompiledStep(backend, layers(1)).scratch_row_bytes == (2 * 192, 0, 0)
    assert CompiledStep(backend, layers(7)).scratch_row_bytes == (2 * 192, 0, 0)


def make_definition(body: Callable[[Operations, Batch, Tensor, Tensor], Any]) -> Definition:
    """The body's results, given the embedded rows as well."""

    def define(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        hidden = ops.embedding(batch.token_ids, numbers(VOCABULARY, HIDDEN, seed=2))
        return (body(ops, batch, pages, hidden),)

    return define


LAYER = CpuBackend(threads=1).prepare_linear(torch.zeros(HIDDEN, HIDDEN))
WEIGHT, OTHER = torch.ones(HIDDEN), torch.zeros(4, dtype=torch.int64)
ROTATION = Rotation(COSINES, SINES, OTHER)
EMPTY_SPANS = Spans(OTHER, OTHER, OTHER[None])


def heads_of(hidden: Tensor) -> Tensor:
    return hidden.view(len(hidden), HEADS, HEAD_DIM)


def rotate(
    ops: Operations,
    batch: Batch,
    pages: Tensor,
    hidden: Tensor,
    *,
    kv_heads: int = KV_HEADS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    keys = heads_of(hidden)[:, :kv_heads] if dtype is hidden.dtype else torch.zeros(4, kv_heads, 8, dtype=dtype)
    rotation = Rotation(COSINES, SINES, batch.positions)
    return ops.rotate_and_write(heads_of(hidden), (keys, keys), rotation, pages=pages, layer=0, slots=batch.slots)


UNREPEATABLE: dict[str, tuple[Callable[[Operations, Batch, Tensor, Tensor], Any], str]] = {
    "arithmetic of torch": (
        lambda ops, b, p, x: ops.rms_norm(x * 2, WEIGHT, 1e-5),
        "not made by one of its operations",
    ),
    "another dtype": (lambda ops, b, p, x: ops.rms_norm(x.view(torch.int32), WEIGHT, 1e-5), "not made by one of its"),
    "some rows": (lambda ops, b, p, x: ops.rms_norm(x[1:], WEIGHT, 1e-5), "of all rows"),
    "rows by slicing": (lambda ops, b, p, x: x[b.num_tokens - 2 :], "of all rows"),
    "rows turned": (lambda ops, b, p, x: ops.rms_norm(x.view(8, 24).T.view(24, 8), WEIGHT, 1e-5), "of all rows"),
    "heads as rows": (lambda ops, b, p, x: ops.rms_norm(x.view(-1, HEAD_DIM), WEIGHT[:8], 1e-5), "of all rows"),
    "every other column": (lambda ops, b, p, x: ops.rms_norm(x[:, ::2], WEIGHT[:24], 1e-5), "of all rows"),
    "heads instead of rows": (lambda ops, b, p, x: ops.linear(LAYER, heads_of(x)), "takes [rows, columns]"),
    "part of a value": (lambda ops, b, p, x: x[:, :8], "whole"),
    "a value that is returned twice": (lambda ops, b, p, x: x, "whole"),
    "a weight that is made": (lambda ops, b, p, x: ops.rms_norm(x, x[0], 1e-5), "a weight is made by an operation"),
    "another width": (lambda ops, b, p, x: ops.linear(LAYER, x[:, :8]), "shape [4, 8], the layer another width"),
    "a residual of other rows": (
        lambda ops, b, p, x: ops.linear(LAYER, ops.take_rows(x, b.drawn_rows), residual=x),
        "a residual has the shape and dtype of the result",
    ),
    "other token ids": (lambda ops, b, p, x: ops.embedding(OTHER, x), "the batch's token_ids"),
    "other rows to take": (lambda ops, b, p, x: ops.take_rows(x, b.token_ids), "drawn_rows or scored_rows"),
    "rows that are taken twice": (
        lambda ops, b, p, x: ops.take_rows(ops.take_rows(x, b.drawn_rows), b.drawn_rows),
        "rows are taken of all tokens",
    ),
    "other positions": (
        lambda ops, b, p, x: ops.rotate_and_write(
            heads_of(x), (heads_of(x), heads_of(x)), ROTATION, pages=p, layer=0, slots=b.slots
        ),
        "positions and slots",
    ),
    "other pages": (lambda ops, b, p, x: rotate(ops, b, torch.zeros(0), x), "into the step's pages"),
    "keys of another dtype": (lambda ops, b, p, x: rotate(ops, b, p, x, dtype=torch.bfloat16), "have one dtype"),
    "layers of other pages": (
        lambda ops, b, p, x: rotate(ops, b, p, rotate(ops, b, p, x).flatten(1), kv_heads=3),
        "all layers the same pages",
    ),
    "other spans": (
        lambda ops, b, p, x: ops.paged_attention(heads_of(x), p, EMPTY_SPANS, layer=0, scale=1.0),
        "attention is over the batch's spans",
    ),
}


@pytest.mark.parametrize("name", UNREPEATABLE)
def test_what_a_recording_could_not_repeat_is_refused(name: str) -> None:
    body, message = UNREPEATABLE[name]
    define = make_definition(body)

    def twice(ops: Operations, batch: Batch, pages: Tensor) -> tuple[Tensor, ...]:
        return define(ops, batch, pages) * 2

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        record(twice if name == "a value that is returned twice" else define)
    assert str(error.value).startswith("a step cannot be recorded: ")


def test_a_layer_of_another_backend_is_refused() -> None:
    other = ReferenceBackend().prepare_linear(torch.zeros(HIDDEN, HIDDEN))
    with pytest.raises(TypeError, match=r"ReferenceLinear object at .* is no linear layer of the compiled kernels"):
        record(make_definition(lambda ops, batch, pages, hidden: ops.linear(other, hidden)))


def test_a_recording_names_what_each_value_has_rows_for() -> None:
    recording = record(make_definition(lambda ops, batch, pages, hidden: ops.take_rows(hidden, batch.scored_rows)))
    assert [part.value.rows_of for each in recording.operations for part in each.outputs] == [
        RowsOf.TOKENS,
        RowsOf.SCORED,
    ]
    assert recording.page_shape is None
