"""Packed layers as named tensors and back: the same bits, and nothing else is taken for a layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.backend import Linear, WeightFormat, select
from kernels.cpu.backend import CpuBackend
from kernels.cpu.packing import CpuPacking
from kernels.reference import ReferenceBackend

KINDS = {
    "float32": (torch.float32, WeightFormat.AS_GIVEN),
    "bfloat16": (torch.bfloat16, WeightFormat.AS_GIVEN),
    "int8": (torch.float32, WeightFormat.INT8),
    "int8-weight": (torch.float32, WeightFormat.INT8_WEIGHT),
    "int4": (torch.bfloat16, WeightFormat.INT4),
}


def make_layers(backend: CpuBackend, kind: str) -> list[Linear]:
    """Plain, biased and gated, of sizes that fill no panel."""
    dtype, stored = KINDS[kind]
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((37, 19), (37,)))
    return [
        backend.prepare_linear(weight, stored=stored),
        backend.prepare_linear(weight, bias, stored=stored),
        backend.prepare_gated_linear((weight, None), (weight.flip(0), None), stored=stored),
        backend.prepare_gated_linear((weight, bias), (weight.flip(0), bias), stored=stored),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_layer_computes_the_same_bits(kind: str) -> None:
    backend, other = CpuBackend(threads=1), CpuBackend(threads=2)
    x = torch.randn(3, 19, generator=torch.Generator().manual_seed(6))
    for layer in make_layers(backend, kind):
        kept = {name: tensor.clone() for name, tensor in backend.packing.tensors(layer).items()}
        assert torch.equal(other.packing.restore(kept)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_does_not_depend_on_threads(kind: str) -> None:
    kept = []
    for threads in (1, 3):
        backend = CpuBackend(threads=threads)
        kept.append([backend.packing.tensors(layer) for layer in make_layers(backend, kind)])
    for one, three in zip(*kept, strict=True):
        assert one.keys() == three.keys()
        assert all(torch.equal(one[name], three[name]) for name in one)


def test_only_what_a_layer_has_is_kept_and_it_is_not_copied() -> None:
    backend = CpuBackend(threads=1)
    names = [list(backend.packing.tensors(layer)) for layer in make_layers(backend, "bfloat16")]
    assert names == [["shape", "panels"], ["shape", "panels", "bias"]] * 2
    layer = make_layers(backend, "int8")[0]
    kept = backend.packing.tensors(layer)
    assert list(kept) == ["shape", "panels", "scales", "sums"]
    assert backend.packing.restore(kept).buffers.panels is kept["panels"]


def make_head(backend: CpuBackend) -> Linear:
    """A layer with a screen, of a size that fills no panel."""
    return backend.prepare_head(torch.randn(37, 19, generator=torch.Generator().manual_seed(5)))


def test_a_restored_head_has_its_screen() -> None:
    backend, other = CpuBackend(threads=1), CpuBackend(threads=2)
    kept = dict(backend.packing.tensors(head := make_head(backend)))
    assert list(kept) == ["shape", "panels", "coarse_panels", "coarse_scales", "errors"]
    restored = other.packing.restore(kept)
    again = other.packing.tensors(restored)
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    x = torch.randn(3, 19, generator=torch.Generator().manual_seed(6))
    assert torch.equal(restored(x), head(x))


CHANGES_OF_SCREEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no-panels": (lambda kept: kept.pop("coarse_panels"), "panels are"),
    "short-panels": (lambda kept: kept.update(coarse_panels=kept["coarse_panels"][64:]), "panels are"),
    "no-scales": (lambda kept: kept.pop("coarse_scales"), "scales are"),
    "short-errors": (lambda kept: kept.update(errors=kept["errors"][:37].clone()), "errors are"),
    "other-errors": (lambda kept: kept.update(errors=kept["errors"].double()), "errors are"),
}


@pytest.mark.parametrize("change", CHANGES_OF_SCREEN)
def test_tensors_that_are_not_a_screens_are_refused(change: str) -> None:
    backend = CpuBackend(threads=1)
    kept = dict(backend.packing.tensors(make_head(backend)))
    alter, message = CHANGES_OF_SCREEN[change]
    alter(kept)
    with pytest.raises(ValueError, match=message):
        backend.packing.restore(kept)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no-shape": (lambda kept: kept.pop("shape"), "has a shape of"),
    "short-shape": (lambda kept: kept.update(shape=torch.tensor([2, 19])), "has a shape of"),
    "float-shape": (lambda kept: kept.update(shape=torch.ones(4)), "has a shape of"),
    "no-such-kind": (lambda kept: kept["shape"].__setitem__(0, 9), "9 is not a valid WeightKind"),
    "no-inputs": (lambda kept: kept["shape"].__setitem__(1, 0), "at least one input"),
    "too-many-inputs": (lambda kept: kept["shape"].__setitem__(1, 2**40), "overflow the sums"),
    "more-inputs": (lambda kept: kept["shape"].__setitem__(1, 25), "panels are"),
    "more-outputs": (lambda kept: kept["shape"].__setitem__(2, 2**40), "rows for 37 outputs"),
    "both-more": (lambda kept: kept["shape"][2:].fill_(65), "panels are"),
    "negative": (lambda kept: kept["shape"][2:].fill_(-1), "-1 rows"),
    "no-panels": (lambda kept: kept.pop("panels"), "panels are"),
    "long-panels": (lambda kept: kept.update(panels=torch.cat([kept["panels"]] * 2)), "panels are"),
    "other-panels": (lambda kept: kept.update(panels=kept["panels"].view(torch.int8)), "panels are"),
    "no-scales": (lambda kept: kept.pop("scales"), "scales are"),
    "strided-scales": (lambda kept: kept.update(scales=kept["scales"].repeat(2)[::2]), "scales are"),
    "no-sums": (lambda kept: kept.pop("sums"), "sums are"),
    "short-bias": (lambda kept: kept.update(bias=torch.zeros(37)), "bias are"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_a_layers_are_refused(change: str) -> None:
    backend = CpuBackend(threads=1)
    kept = dict(backend.packing.tensors(make_layers(backend, "int8")[0]))
    alter, message = CHANGES[change]
    alter(kept)
    with pytest.raises(ValueError, match=message):
        backend.packing.restore(kept)


@pytest.mark.parametrize("kind", ["int8-weight", "int4"])
def test_scales_are_as_many_as_a_format_has(kind: str) -> None:
    # One scale per output where rows stay as they are, and per output and group of 64 inputs: 19 are one group.
    backend = CpuBackend(threads=1)
    kept = dict(backend.packing.tensors(make_layers(backend, kind)[0]))
    assert list(kept) == ["shape", "panels", "scales"]
    assert kept["scales"].shape == (64,)
    for changes in ({"scales": torch.zeros(32)}, {"scales": torch.zeros(128)}, {"sums": torch.zeros(64).int()}):
        with pytest.raises(ValueError, match=f"a packed layer's {next(iter(changes))} are"):
            backend.packing.restore(kept | changes)
    wide = backend.prepare_linear(torch.ones(37, 65), stored=KINDS[kind][1])
    assert len(backend.packing.tensors(wide)["scales"]) == (128 if kind == "int4" else 64)


def test_a_layer_of_another_backend_is_not_packed() -> None:
    layer = ReferenceBackend().prepare_linear(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="no linear layer of the compiled kernels"):
        CpuBackend(threads=1).packing.tensors(layer)


def test_the_reference_keeps_nothing() -> None:
    assert select("cpu-reference").packing is None


def test_another_build_of_the_library_is_another_version() -> None:
    backend = CpuBackend(threads=1)
    assert backend.packing.version == CpuBackend(threads=2).packing.version
    assert backend.packing.version != CpuPacking(backend, b"another build").version
