"""Memory for packed weights: parts of large mappings, in huge pages, alive as long as any part."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import memory
from kernels.cpu.backend import CpuBackend
from kernels.cpu.memory import MAPPING_BYTES, WeightMemory


def flags_of(tensor: Tensor) -> list[str]:
    """Of the mapping in which a tensor begins, as the kernel tells them."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(match[1], 16) <= tensor.data_ptr() < int(match[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the tensor lies in no mapping")


def test_parts_begin_at_lines_and_follow_one_another() -> None:
    weights = WeightMemory()
    first, second, third = weights.take(100), weights.take(64), weights.take(1)
    assert first.data_ptr() % 64 == 0
    assert (second.data_ptr() - first.data_ptr(), third.data_ptr() - second.data_ptr()) == (128, 64)
    assert (len(first), first.dtype) == (100, torch.uint8)


def test_no_bytes_are_a_part_too() -> None:
    assert len(WeightMemory().take(0)) == 0


def test_a_part_that_does_not_fit_gets_another_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAPPING_BYTES", 4 << 20)
    weights = WeightMemory()
    parts = [weights.take(3 << 20) for _ in range(3)] + [weights.take(9 << 20)]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [int(part.sum()) for part in parts] == [number * len(part) for number, part in enumerate(parts)]


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_mappings_ask_for_huge_pages() -> None:
    assert "hg" in flags_of(WeightMemory().take(1))


def test_what_no_layer_took_takes_no_memory() -> None:
    before = _resident_bytes()
    weights = WeightMemory()
    weights.take(1000).fill_(1)
    assert _resident_bytes() - before < MAPPING_BYTES // 4


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_layer_outlives_its_backend_and_its_neighbours() -> None:
    backend = CpuBackend(threads=1)
    neighbour, layer = (backend.prepare_linear(torch.full((2, 3), value)) for value in (1.0, 2.0))
    del backend, neighbour
    assert layer(torch.ones(1, 3)).tolist() == [[6.0, 6.0]]
