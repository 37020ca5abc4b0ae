"""The layer of whose outputs only the largest counts: always found, with its own bits, and little else computed."""

from ctypes import byref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import library as abi
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import InstructionSet, matrix
from kernels.cpu.linear import CpuLinear
from kernels.cpu.screening import coarse_copy

BEST = CpuBackend(threads=1).isa
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULED_OUT = torch.finfo(torch.float32).min
MOST_ROWS = 4
"""With more, all outputs are computed."""


@pytest.fixture(params=[isa for isa in InstructionSet if isa <= BEST], ids=lambda isa: isa.name.lower())
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(threads=2, instruction_set=request.param)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest(backend: CpuBackend, layer: CpuLinear, x: Tensor) -> Tensor:
    """[rows, outputs], float32; starts as NaN, so that nothing is left as it was unnoticed."""
    out = torch.full((len(x), layer.out_features), torch.nan)
    status = backend.library.staffetta_largest(
        backend.isa, backend.threads, byref(layer.packed), byref(layer.screened), byref(matrix(x)), byref(matrix(out))
    )
    assert status == abi.Status.OK
    return out


def exact(layer: CpuLinear, x: Tensor) -> Tensor:
    return layer(x, dtype=torch.float32)


def has_the_largest(found: Tensor, expected: Tensor) -> None:
    """What is not ruled out has its bits, and is all that is largest: the first of equals is found."""
    left = found != RULED_OUT
    assert torch.equal(found[left], expected[left])
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    assert torch.equal(found.amax(dim=1), expected.amax(dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize(("outputs", "inputs"), [(4003, 96), (2048, 257)])
def test_the_largest_has_its_bits_and_few_others_are_computed(
    backend: CpuBackend, dtype: torch.dtype, rows: int, outputs: int, inputs: int
) -> None:
    layer = backend.prepare_head(numbers(outputs, inputs).to(dtype))
    for seed in range(8):
        x = numbers(rows, inputs, seed=seed).to(dtype)
        found = largest(backend, layer, x)
        has_the_largest(found, exact(layer, x))
        assert (found == RULED_OUT).float().mean() > 0.7


def test_what_is_found_does_not_depend_on_threads() -> None:
    weight, x = numbers(4003, 96), numbers(3, 96, seed=2)
    found = []
    for threads in (1, 2, 5):
        backend = CpuBackend(threads=threads)
        found.append(largest(backend, backend.prepare_head(weight), x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def near_ties(dtype: torch.dtype) -> Tensor:
    """A head whose largest outputs int8 does not tell apart: 20 panels hold rows that differ by little."""
    weight = numbers(4096, 64).to(dtype) / 8
    for number in range(20):
        row = 1 + numbers(64, seed=number) / 32
        row[0] = 8.0  # int8 has steps of 8 / 127
        weight[number * 200 + 5] = row.to(dtype)
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_that_the_copy_does_not_tell_apart_are_all_computed(backend: CpuBackend, dtype: torch.dtype) -> None:
    layer = backend.prepare_head(near_ties(dtype))
    wrong = 0
    for seed in range(10):
        x = (1 + numbers(2, 64, seed=seed).abs()).to(dtype)
        found, expected = largest(backend, layer, x), exact(layer, x)
        has_the_largest(found, expected)
        assert (found == RULED_OUT).float().mean() > 0.7
        coarse = CpuLinear(backend, layer.screen.coarse) if layer.screen else None
        assert coarse is not None
        wrong += int((exact(coarse, x).argmax(dim=1) != expected.argmax(dim=1)).sum())
    assert wrong >= 3  # what the copy finds the largest is not, often enough


def test_without_errors_another_would_be_found(backend: CpuBackend) -> None:
    layer = backend.prepare_head(near_ties(torch.float32))
    assert layer.screen is not None
    layer.screen.errors.zero_()
    inputs = [1 + numbers(1, 64, seed=seed).abs() for seed in range(10)]
    assert any(not torch.equal(largest(backend, layer, x).argmax(1), exact(layer, x).argmax(1)) for x in inputs)


def test_of_equal_outputs_the_first_is_found(backend: CpuBackend) -> None:
    weight = numbers(4096, 64)
    weight[77] = weight[2001] = weight[4095] = 3.0
    layer = backend.prepare_head(weight)
    found = largest(backend, layer, torch.ones(1, 64))
    assert found.argmax() == 77
    assert found[0, 77] == found[0, 2001] == found[0, 4095] == 192


@pytest.mark.parametrize(
    "row",
    [numbers(64) * 0, numbers(64) * 2.0**-45, numbers(64) * 2.0**55, numbers(64) / 0, numbers(64) * torch.nan],
    ids=["zeros", "too short", "too long", "infinite", "not a number"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_the_bounds_say_nothing_all_are_computed(backend: CpuBackend, dtype: torch.dtype, row: Tensor) -> None:
    layer = backend.prepare_head(numbers(4096, 64).to(dtype))
    x = numbers(3, 64, seed=2)
    x[1] = row
    found, expected = largest(backend, layer, x.to(dtype)), exact(layer, x.to(dtype))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("exponent", [15, 24, 30, 48])
def test_weights_that_dot_products_take_as_0_are_allowed_for(backend: CpuBackend, exponent: int) -> None:
    weight = torch.zeros(4096, 1024)
    weight[100] = 2.0**-126 * 127 / 128  # subnormal: 0 to some instructions, and not to the copy
    weight[3000, :512] = 2.0**-126
    weight[100, 0] = weight[3000, 0] = 2.0**-121
    x = torch.full((1, 1024), 2.0**exponent / 32)
    x[0, 0] = 0.0
    layer = backend.prepare_head(weight.bfloat16())
    has_the_largest(largest(backend, layer, x.bfloat16()), exact(layer, x.bfloat16()))


def test_where_too_few_are_ruled_out_all_are_computed(backend: CpuBackend) -> None:
    weight = numbers(4096, 64)
    weight[:, 0] = 1e4  # int8 has nothing left for the others
    x = numbers(1, 64)
    x[0, 0] = 0.0
    layer = backend.prepare_head(weight)
    assert torch.equal(largest(backend, layer, x), exact(layer, x))


def test_a_copy_that_was_asked_in_vain_is_not_asked_in_64_calls(backend: CpuBackend) -> None:
    weight, in_vain, x = numbers(4096, 64), torch.zeros(1, 64), numbers(1, 64, seed=2)
    weight[2000:, 0] = 100.0
    in_vain[0, 1] = 1e-6
    in_vain[0, 0] = 1.0
    layer = backend.prepare_head(weight)
    assert (largest(backend, layer, x) == RULED_OUT).any()
    assert torch.equal(largest(backend, layer, in_vain), exact(layer, in_vain))
    for _ in range(64):
        assert torch.equal(largest(backend, layer, x), exact(layer, x))
    assert (largest(backend, layer, x) == RULED_OUT).any()


def test_for_more_rows_all_are_computed(backend: CpuBackend) -> None:
    layer, x = backend.prepare_head(numbers(4096, 64)), numbers(MOST_ROWS + 1, 64, seed=2)
    assert torch.equal(largest(backend, layer, x), exact(layer, x))
    assert (largest(backend, layer, x[:MOST_ROWS]) == RULED_OUT).any()


def test_no_rows_have_no_outputs(backend: CpuBackend) -> None:
    layer = backend.prepare_head(numbers(64, 64))
    assert largest(backend, layer, torch.empty(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
def test_weights_that_cannot_be_bounded_have_no_screen(value: float) -> None:
    weight = numbers(64, 64)
    weight[5, 5] = value
    assert CpuBackend(threads=1).prepare_head(weight).screen is None


def test_a_head_is_otherwise_the_layer_that_it_would_be(backend: CpuBackend) -> None:
    weight, x = numbers(70, 37), numbers(5, 37, seed=2)
    assert torch.equal(backend.prepare_head(weight)(x), backend.prepare_linear(weight)(x))
    assert backend.prepare_linear(weight).screen is None


@given(
    seed=st.integers(0, 2**16),
    inputs=st.integers(1, 300),
    exponent=st.integers(-30, 30),
    outlier=st.sampled_from([1.0, 30.0, 3000.0]),
    dtype=st.sampled_from(DTYPES[:2]),
)
@settings(max_examples=60, deadline=None)
def test_errors_bound_what_the_copy_gets_wrong(
    seed: int, inputs: int, exponent: int, outlier: float, dtype: torch.dtype
) -> None:
    backend = CpuBackend(threads=1)
    weight = (numbers(40, inputs, seed=seed) * 2.0**exponent).to(dtype)
    weight[:, seed % inputs] *= outlier
    x = numbers(3, inputs, seed=seed + 1).to(dtype)
    layer = backend.prepare_head(weight)
    assert layer.screen is not None
    off = (exact(CpuLinear(backend, layer.screen.coarse), x).double() - exact(layer, x).double()).abs()
    bounds = x.double().norm(dim=1, keepdim=True) * coarse_copy(weight).errors.double()
    assert (off <= bounds).all()
    assert torch.equal(layer.screen.errors[:40], coarse_copy(weight).errors)
