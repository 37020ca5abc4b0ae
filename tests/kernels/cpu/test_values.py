"""The compiled kernels against the reference: values within rounding, over odd, empty and strided shapes."""

import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.backend import Backend, Linear, Rotation, Spans, WeightFormat
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import InstructionSet
from kernels.reference import ReferenceBackend
from kernels.rope import Rope

REFERENCE = ReferenceBackend()
BEST = CpuBackend(threads=1).isa
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


@pytest.fixture(params=[isa for isa in InstructionSet if isa <= BEST], ids=lambda isa: isa.name.lower())
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(threads=2, instruction_set=request.param)


def close(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """Equal within the rounding of `actual`'s dtype; `scale` is how large the summands are."""
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("stored", WeightFormat, ids=lambda stored: stored.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 4), (1, 1, 1), (3, 37, 5), (17, 64, 33), (40, 521, 70)])
def test_linear_layers(
    backend: CpuBackend, dtype: torch.dtype, stored: WeightFormat, rows: int, inputs: int, outputs: int
) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    x, residual = torch.randn(rows, inputs * 2)[:, ::2].to(dtype), torch.randn(rows, outputs).to(dtype)

    def pairs() -> list[tuple[Linear, Linear]]:
        both = (backend, REFERENCE)
        gate, up = (weight, bias), (weight.flip(0), None)
        plain = [each.prepare_linear(weight, bias, stored=stored) for each in both]
        gated = [each.prepare_gated_linear((weight, None), up, stored=stored) for each in both]
        biased = [each.prepare_gated_linear(gate, (up[0], bias), stored=stored) for each in both]
        return [(ours, theirs) for ours, theirs in (plain, gated, biased)]

    for ours, theirs in pairs():
        close(ours(x), theirs(x), scale=inputs)
        close(ours(x, residual=residual), theirs(x, residual=residual), scale=inputs)


def test_float32_rows_through_bfloat16_weights_stay_float32(backend: CpuBackend) -> None:
    weight, x = torch.randn(70, 33).bfloat16(), torch.randn(5, 33)
    close(backend.prepare_linear(weight)(x), x @ weight.float().T, scale=33)


@pytest.mark.parametrize("stored", WeightFormat, ids=lambda stored: stored.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_float32_are_those_of_the_rows_and_rounded_once(
    backend: CpuBackend, dtype: torch.dtype, stored: WeightFormat
) -> None:
    weight, x, residual = torch.randn(70, 41).to(dtype), torch.randn(5, 41).to(dtype), torch.randn(5, 70)
    for each in (backend, REFERENCE):
        layers = (
            each.prepare_linear(weight, stored=stored),
            each.prepare_gated_linear((weight, None), (weight.flip(0), None), stored=stored),
        )
        for layer in layers:
            wide = each.linear(layer, x, residual=residual, dtype=torch.float32)
            assert wide.dtype == torch.float32
            close(wide, layer(x.float(), residual=residual), scale=41)
            assert wide.to(dtype).float().ne(wide).any() or dtype is torch.float32
    exact = backend.linear(backend.prepare_linear(weight, stored=stored), x, dtype=torch.float32)
    assert torch.equal(exact.to(dtype), backend.prepare_linear(weight, stored=stored)(x))


def test_int8_sums_are_exact(backend: CpuBackend) -> None:
    # Every product at its extreme: a sum that saturates or rounds on the way shows.
    weight, x = torch.ones(3, 4097), torch.ones(2, 4097)
    weight[1], x[1] = -1, -1
    out = backend.prepare_linear(weight, stored=WeightFormat.INT8)(x)
    torch.testing.assert_close(out, torch.tensor([[4097.0, -4097, 4097], [-4097, 4097, -4097]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (37, 5), (64, 33), (521, 70)])
def test_integers_with_scales_give_the_bits_of_the_weights_they_were_made_of(
    backend: CpuBackend, inputs: int, outputs: int
) -> None:
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(7, inputs)
    integers, scales = reference.quantize_rows(weight)
    for each in (backend, REFERENCE):
        expected = each.prepare_linear(weight, bias, stored=WeightFormat.INT8)(x)
        assert torch.equal(each.prepare_linear(integers, bias, scales=scales)(x), expected)
        gate, up = (weight, None), (weight.flip(0), None)
        expected = each.prepare_gated_linear(gate, up, stored=WeightFormat.INT8)(x)
        flipped = (integers.flip(0), None)
        gated = each.prepare_gated_linear((integers, None), flipped, scales=(scales, scales.flip(0)))
        assert torch.equal(gated(x), expected)


def test_the_smallest_integer_is_multiplied_exactly(backend: CpuBackend) -> None:
    # Symmetric quantizers of others use -128 too.
    weight, scales = torch.full((3, 4097), -128, dtype=torch.int8), torch.tensor([1.0, 2.0, 0.5])
    out = backend.prepare_linear(weight, scales=scales)(torch.full((1, 4097), 127.0))
    assert out.tolist() == [[-128.0 * 127 * 4097 * scale for scale in (1.0, 2.0, 0.5)]]


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (torch.ones(4, 8, dtype=torch.int8), None, r"an int8 weight needs scales of shape \[4\], it has none"),
        (torch.ones(4, 8, dtype=torch.int8), torch.ones(3), r"needs scales of shape \[4\], it has shape \[3\]"),
        (torch.ones(4, 8), torch.ones(4), "a weight of torch.float32 has no scales"),
    ],
)
def test_integers_and_scales_come_together(weight: Tensor, scales: Tensor | None, message: str) -> None:
    pair = None if scales is None else (scales, scales)
    for each in (CpuBackend(threads=1), REFERENCE):
        with pytest.raises(ValueError, match=message):
            each.prepare_linear(weight, scales=scales)
        with pytest.raises(ValueError, match=message):
            each.prepare_gated_linear((weight, None), (weight, None), scales=pair)


@pytest.mark.parametrize("stored", [WeightFormat.INT8_WEIGHT, WeightFormat.INT4])
def test_integers_are_not_made_into_others(stored: WeightFormat) -> None:
    weight, scales = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    for each in (CpuBackend(threads=1), REFERENCE):
        with pytest.raises(ValueError, match=f"an int8 weight is multiplied as int8, not as {stored.value}"):
            each.prepare_linear(weight, stored=stored, scales=scales)
        with pytest.raises(ValueError, match=f"an int8 weight is multiplied as int8, not as {stored.value}"):
            each.prepare_gated_linear((weight, None), (weight, None), stored=stored, scales=(scales, scales))


def spread_integers(outputs: int, inputs: int, *, low: int, high: int) -> Tensor:
    """Every integer of the range in turn, at another place in every row."""
    return (torch.arange(outputs)[:, None] * 7 + torch.arange(inputs) * 3) % (high - low + 1) + low


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_8_bit_weight_is_multiplied_as_what_it_is(backend: CpuBackend, dtype: torch.dtype) -> None:
    # A row of the identity picks an input's weights: what comes back is exact.
    inputs, outputs = 259, 70
    weight = spread_integers(outputs, inputs, low=-127, high=127).float()
    weight[:, 0] = 127  # makes every scale 1
    layer = backend.prepare_linear(weight, stored=WeightFormat.INT8_WEIGHT)
    assert torch.equal(layer(torch.eye(inputs, dtype=dtype)).float(), weight.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_4_bit_weight_is_multiplied_as_what_it_is(backend: CpuBackend, dtype: torch.dtype) -> None:
    # Groups of 64 and a smaller one, each with a scale of its own, of either sign.
    inputs, outputs = 3 * 64 + 19, 70
    weight = spread_integers(outputs, inputs, low=-7, high=7).float()
    weight[:, ::64] = -8
    weight *= torch.tensor([1.0, -2.0, 0.25, 4.0]).repeat_interleave(64)[:inputs]
    layer = backend.prepare_linear(weight, stored=WeightFormat.INT4)
    assert torch.equal(layer(torch.eye(inputs, dtype=dtype)).float(), weight.T)


def test_integers_for_weights_alone_take_rows_as_they_are(backend: CpuBackend) -> None:
    # What quantized rows would lose: an input of a ten-thousandth of the row's largest.
    weight, x = torch.full((33, 70), 3.0), torch.tensor([[1.0, 1e-4, *[0.0] * 68]])
    expected = torch.full((1, 33), 3.0003)
    for stored in (WeightFormat.INT8_WEIGHT, WeightFormat.INT4):
        torch.testing.assert_close(backend.prepare_linear(weight, stored=stored)(x), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("stored", WeightFormat, ids=lambda stored: stored.name.lower())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_its_row_and_no_other(backend: CpuBackend, stored: WeightFormat, bad: float) -> None:
    x = torch.randn(20, 50)
    x[7, 13] = bad
    out = backend.prepare_linear(torch.randn(40, 50), stored=stored)(x)
    assert not out[7].isfinite().any()
    assert out[:7].isfinite().all()
    assert out[8:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(0, 5), (1, 1), (7, 64), (5, 133)])
def test_norms(backend: CpuBackend, dtype: torch.dtype, rows: int, hidden: int) -> None:
    x = torch.randn(rows, hidden * 2).to(dtype)[:, ::2]
    residual, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, hidden), (hidden,), (hidden,)))
    close(backend.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    for ours, theirs in zip(
        backend.add_rms_norm(x, residual, weight, 1e-5), REFERENCE.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        close(ours, theirs)
    close(backend.layer_norm(x, weight, bias, 1e-5), REFERENCE.layer_norm(x, weight, bias, 1e-5), scale=4)
    close(backend.layer_norm(x, weight, None, 1e-5), REFERENCE.layer_norm(x, weight, None, 1e-5), scale=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(4, 2, 32, 16), (3, 3, 5, 1), (6, 1, 80, 64)])
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"soft_cap": 4.0}, {"window": 1, "soft_cap": 2.0}], ids=str)
def test_paged_attention(
    backend: CpuBackend,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    options: dict[str, float],
) -> None:
    contexts, counts = [150, 70, 3, 1], [40, 1, 3, 1]
    num_blocks = [-(-context // block_size) for context in contexts]
    pages = torch.full((sum(num_blocks) + 2, kv_heads, 3, 2, block_size, dim), math.nan, dtype=dtype)
    free = torch.randperm(len(pages)).tolist()
    tables = torch.full((4, max(num_blocks)), 10**9)
    for s, context in enumerate(contexts):
        tables[s, : num_blocks[s]] = torch.tensor([free.pop() for _ in range(num_blocks[s])])
        slots = torch.tensor([tables[s, p // block_size] * block_size + p % block_size for p in range(context)])
        kv = torch.randn(2, context, kv_heads, dim).to(dtype)
        reference.write_kv(kv[0], kv[1], pages, layer=2, slots=slots)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    spans = Spans(starts, torch.tensor(contexts), tables)
    query = torch.randn(sum(counts), heads * 2, dim).to(dtype)[:, ::2]
    window, soft_cap = options.get("window"), options.get("soft_cap")
    arguments = {"layer": 2, "scale": dim**-0.5, "window": None if window is None else int(window)}
    ours = backend.paged_attention(query, pages, spans, **arguments, soft_cap=soft_cap)
    theirs = REFERENCE.paged_attention(query, pages, spans, **arguments, soft_cap=soft_cap)
    assert ours.is_contiguous()
    close(ours, theirs)


def test_attention_refuses_tables_that_leave_the_pages_and_contexts_that_leave_the_tables(backend: CpuBackend) -> None:
    pages, query = torch.zeros(4, 1, 1, 2, 16, 8), torch.zeros(2, 1, 8)
    starts = torch.tensor([0, 2])
    for context, table in ((20, [0, 4]), (20, [-1, 0]), (33, [0, 1]), (1, [0, 1])):
        spans = Spans(starts, torch.tensor([context]), torch.tensor([table]))
        with pytest.raises(IndexError, match="4 pages"):
            backend.paged_attention(query, pages, spans, layer=0, scale=1.0)
    spans = Spans(starts, torch.tensor([2]), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="more than 96 query heads"):
        backend.paged_attention(torch.zeros(2, 97, 8), pages, spans, layer=0, scale=1.0)
    with pytest.raises(ValueError, match="query and pages differ in type"):
        backend.paged_attention(query.bfloat16(), pages, spans, layer=0, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 64, 80])
def test_rotation_and_write(backend: CpuBackend, dtype: torch.dtype, dim: int) -> None:
    tables = backend.rope_tables(Rope(1e4), head_dim=dim, num_positions=50)
    fused = torch.randn(9, 7, dim).to(dtype)
    query, keys, values = fused[:, :3], fused[:, 3:5], fused[:, 5:]
    rotation = Rotation(*tables, torch.randint(0, 50, (9,)))
    slots = torch.randperm(5 * 4)[:9]
    pages = [torch.full((5, 2, 3, 2, 4, dim), -1.0, dtype=dtype) for _ in range(2)]
    both: list[Backend] = [backend, REFERENCE]
    ours, theirs = (
        each.rotate_and_write(query, (keys, values), rotation, pages=memory, layer=1, slots=slots)
        for each, memory in zip(both, pages, strict=True)
    )
    close(ours, theirs)
    close(pages[0], pages[1])
    assert torch.equal(pages[0][:, :, 1, 1], pages[1][:, :, 1, 1]), "values are copied"


def test_a_slot_or_position_out_of_range_is_refused_and_nothing_written(backend: CpuBackend) -> None:
    tables = backend.rope_tables(Rope(1e4), head_dim=4, num_positions=5)
    pages, heads = torch.zeros(2, 1, 1, 2, 4, 4), torch.ones(2, 1, 4)
    for position, slot in ((5, 0), (-1, 0), (0, 8), (0, -1)):
        rotation = Rotation(*tables, torch.tensor([0, position]))
        with pytest.raises(IndexError, match="outside 2 pages, or a position outside 5"):
            backend.rotate_and_write(
                heads, (heads, heads), rotation, pages=pages, layer=0, slots=torch.tensor([1, slot])
            )
    assert not pages.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 4, 97, 9001])
def test_log_softmax(backend: CpuBackend, dtype: torch.dtype, vocab_size: int) -> None:
    logits = (torch.randn(5, vocab_size) * 6).to(dtype)
    torch.testing.assert_close(backend.log_softmax(logits), REFERENCE.log_softmax(logits), rtol=1e-6, atol=2e-6)


def test_log_softmax_survives_large_logits_and_masks(backend: CpuBackend) -> None:
    logits = torch.tensor([[1000.0, 1000.0, 999.0, -math.inf], [-1e4, 0.0, 3.0, 3.0]])
    torch.testing.assert_close(backend.log_softmax(logits), logits.log_softmax(-1), rtol=1e-6, atol=1e-6)
    assert backend.log_softmax(torch.zeros(0, 4)).shape == (0, 4)


def test_embedding(backend: CpuBackend) -> None:
    table = torch.arange(12.0).view(4, 3)
    assert backend.embedding(torch.tensor([2, 0, 2]), table).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    assert backend.embedding(torch.tensor([], dtype=torch.int64), table).shape == (0, 3)
    for token_id in (4, -1):
        with pytest.raises(IndexError, match="outside the vocabulary of 4"):
            backend.embedding(torch.tensor([0, token_id]), table)


def test_rows_are_taken_as_the_reference_takes_them() -> None:
    x = torch.arange(24.0).view(4, 6)[:, ::2]
    for each in (CpuBackend(threads=1), REFERENCE):
        assert each.take_rows(x, torch.tensor([3, 0, 3])).tolist() == [[18, 20, 22], [0, 2, 4], [18, 20, 22]]
        assert each.take_rows(x, torch.tensor([], dtype=torch.int64)).shape == (0, 3)
        for index in (4, -1):
            with pytest.raises(IndexError):
                each.take_rows(x, torch.tensor([0, index]))
