"""The reference operations against formulas written out in float64, over odd, empty and strided shapes."""

import math

import pytest
import torch
from torch import Tensor

from kernels import reference as ops
from kernels.rope import LinearScaling, Llama3Scaling, Rope


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def strided(*shape: int) -> Tensor:
    """Random values of the given shape whose last dimension is not contiguous."""
    tensor = torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2]
    assert not tensor.is_contiguous()
    return tensor


def close(actual: Tensor, expected: Tensor, *, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=atol)


def test_embedding_returns_the_rows_of_the_table() -> None:
    table = torch.arange(12.0).view(4, 3)
    assert ops.embedding(torch.tensor([2, 0, 2]), table).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    assert ops.embedding(torch.tensor([], dtype=torch.int64), table).shape == (0, 3)


def test_embedding_refuses_a_token_outside_the_table() -> None:
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([4]), torch.zeros(4, 3))


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (3, 37, 5), (17, 64, 33), (0, 8, 4)])
def test_linear_is_a_sum_over_k_plus_bias(rows: int, k: int, n: int) -> None:
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    expected = (x.double()[:, None] * weight.double()[None]).sum(-1)
    close(ops.linear(x, weight), expected)
    close(ops.linear(x, weight, bias), expected + bias.double())


def test_linear_takes_strided_rows() -> None:
    x, weight = strided(5, 24), torch.randn(7, 24)
    close(ops.linear(x, weight), x.double() @ weight.double().T)


def test_linear_in_bfloat16_sums_in_float32() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    # A running bfloat16 sum of ones stops growing at 256.
    assert ops.linear(ones, ones).item() == 4096


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("hidden", [1, 7, 96])
def test_rms_norm_divides_by_the_root_of_the_mean_square(rows: int, hidden: int) -> None:
    x, weight = torch.randn(rows, hidden), torch.randn(hidden)
    wide = x.double()
    expected = wide / ((wide**2).sum(-1, keepdim=True) / hidden + 1e-5) ** 0.5 * weight.double()
    close(ops.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_in_bfloat16_is_rounded_once() -> None:
    x = torch.randn(4, 1000).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = ops.rms_norm(x, torch.ones(1000, dtype=torch.bfloat16), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=2**-8 * 1.01, atol=0)


def test_add_rms_norm_returns_the_sum_and_writes_neither_input() -> None:
    x, residual, weight = strided(4, 10), torch.randn(4, 10), torch.randn(10)
    before = x.clone(), residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, before[0] + before[1])
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-6))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def frequencies(rope: Rope, *, head_dim: int) -> list[float]:
    """Frequencies by the papers' words, one at a time, in float64."""
    result = []
    for i in range(head_dim // 2):
        plain = rope.theta ** (-2 * i / head_dim)
        match rope.scaling:
            case None:
                result.append(plain)
            case LinearScaling(factor):
                result.append(plain / factor)
            case Llama3Scaling() as s:
                wavelength, length = 2 * math.pi / plain, s.original_max_position_embeddings
                smooth = (length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                if wavelength > length / s.low_freq_factor:
                    result.append(plain / s.factor)
                elif wavelength < length / s.high_freq_factor:
                    result.append(plain)
                else:
                    result.append((1 - smooth) * plain / s.factor + smooth * plain)
    return result


LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("rope", [Rope(10_000.0), Rope(500.0, LinearScaling(4.0)), Rope(500_000.0, LLAMA3)], ids=repr)
def test_rope_tables_hold_the_angles_of_the_papers(rope: Rope) -> None:
    cos, sin = ops.rope_tables(rope, head_dim=32, num_positions=50)
    angles = torch.arange(50.0, dtype=torch.float64)[:, None] * torch.tensor(frequencies(rope, head_dim=32)).double()
    assert cos.dtype == sin.dtype == torch.float32
    close(cos, angles.cos())
    close(sin, angles.sin())


def test_llama3_scaling_keeps_fast_angles_divides_slow_ones_and_blends_between() -> None:
    plain, scaled = (
        torch.atan2(sin[1], cos[1])  # at position 1 the angle is the frequency
        for cos, sin in (ops.rope_tables(Rope(1e4, s), head_dim=64, num_positions=2) for s in (None, LLAMA3))
    )
    ratios = scaled / plain
    fast, slow = plain > 2 * math.pi / (64 / 4), plain < 2 * math.pi / 64
    torch.testing.assert_close(ratios[fast], torch.ones_like(ratios[fast]))
    torch.testing.assert_close(ratios[slow], torch.full_like(ratios[slow], 1 / 8))
    between = ratios[~fast & ~slow]
    assert len(between) == 5
    assert (between.diff() < 0).all()
    assert 1 / 8 < between.min() < between.max() < 1


def test_rope_tables_refuse_scaling_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="unknown rope scaling 'yarn'; supported: None, LinearScaling, Llama3Scaling"):
        ops.rope_tables(Rope(1e4, "yarn"), head_dim=8, num_positions=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even head_dim, not 7"):
        ops.rope_tables(Rope(1e4), head_dim=7, num_positions=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_rope_multiplies_complex_pairs(dtype: torch.dtype) -> None:
    cos, sin = ops.rope_tables(Rope(10_000.0), head_dim=12, num_positions=30)
    positions = torch.tensor([0, 3, 29, 3])
    x = strided(4, 5, 12).to(dtype)
    pairs = torch.complex(x[..., :6].double(), x[..., 6:].double())
    turned = pairs * torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    rotated = ops.apply_rope(x, cos[positions], sin[positions])
    assert rotated.dtype == dtype
    close(rotated, torch.cat((turned.real, turned.imag), -1), atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(rotated[0], x[0]), "position 0 does not turn"


def test_silu_mul_gates() -> None:
    gate, up = strided(3, 5), strided(3, 5)
    close(ops.silu_mul(gate, up), gate.double() / (1 + (-gate.double()).exp()) * up.double())
    assert ops.silu_mul(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_touches_its_slots_and_nothing_else(dtype: torch.dtype) -> None:
    heads, layers, block_size, dim = 2, 3, 4, 6
    pages = torch.full((5, heads, layers, 2, block_size, dim), -1.0, dtype=dtype)
    keys, values = strided(3, heads, dim).to(dtype), strided(3, heads, dim).to(dtype)
    slots = [2 * block_size + 1, 4 * block_size + 3, 0]
    expected = pages.clone()
    for row, slot in enumerate(slots):
        for head in range(heads):
            expected[slot // block_size, head, 1, 0, slot % block_size] = keys[row, head]
            expected[slot // block_size, head, 1, 1, slot % block_size] = values[row, head]
    ops.write_kv(keys, values, pages, layer=1, slots=torch.tensor(slots))
    assert torch.equal(pages, expected)


def test_write_kv_refuses_a_slot_outside_the_pages() -> None:
    pages = torch.zeros(2, 1, 1, 2, 4, 2)
    with pytest.raises(IndexError):
        ops.write_kv(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), pages, layer=0, slots=torch.tensor([8]))


def test_log_softmax_is_float32_and_survives_large_logits() -> None:
    logits = torch.tensor([[1000.0, 1000.0, 999.0], [-1e4, 0.0, 3.0]])
    wide = logits.double()
    expected = wide - wide.amax(-1, keepdim=True)
    expected = expected - expected.exp().sum(-1, keepdim=True).log()
    close(ops.log_softmax(logits), expected)
    assert ops.log_softmax(logits.bfloat16()).dtype == torch.float32
    assert ops.log_softmax(torch.zeros(0, 4)).shape == (0, 4)


def test_groups_use_all_sixteen_numbers_whichever_sign_the_largest_weight_has() -> None:
    weight = torch.zeros(2, 70)
    weight[0, :5] = torch.tensor([4.0, -1.0, 0.25, -3.9, 3.5])  # scale -0.5
    weight[1, 0], weight[1, 64:67] = 1.0, torch.tensor([-16.0, 14.0, 15.9])  # scales -1 / 8 and 2
    quantized, scales = ops.quantize_groups(weight)
    assert quantized.dtype == torch.int8
    assert quantized[0, :6].tolist() == [-8, 2, 0, 7, -7, 0]
    assert quantized[1, [0, 64, 65, 66, 67]].tolist() == [-8, -8, 7, 7, 0]
    assert scales.tolist() == [[-0.5, 0.0], [-0.125, 2.0]]


def test_a_group_is_quantized_by_itself() -> None:
    weight = torch.randn(3, 192, generator=torch.Generator().manual_seed(5))
    quantized, scales = ops.quantize_groups(weight)
    for group in range(3):
        part = slice(64 * group, 64 * group + 64)
        alone = ops.quantize_groups(weight[:, part])
        assert torch.equal(alone[0], quantized[:, part])
        assert torch.equal(alone[1][:, 0], scales[:, group])


def test_weights_of_four_bits_are_off_by_half_a_scale_at_most_and_the_far_end_by_one() -> None:
    weight = torch.randn(5, 130, generator=torch.Generator().manual_seed(6))
    quantized, scales = ops.quantize_groups(weight)
    wide = scales.repeat_interleave(64, dim=1)[:, :130]
    errors = (quantized * wide - weight).abs() / wide.abs()
    assert errors[quantized < 7].max() <= 0.5 + 1e-5
    assert errors.max() <= 1 + 1e-5


def test_integer_weights_are_multiplied_by_rows_as_they_are() -> None:
    weight, scales = torch.tensor([[2, -3, 5]], dtype=torch.int8), torch.tensor([0.5])
    x, bias = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([0.25])
    assert ops.int8_weight_linear(x, weight, scales, bias).tolist() == [[236.25]]
    assert ops.int4_linear(x, weight, scales[:, None], bias).tolist() == [[236.25]]
    halves = ops.int8_weight_linear(x.bfloat16(), weight, scales)
    assert (halves.dtype, halves.tolist()) == (torch.bfloat16, [[236.0]])
