"""Choosing a backend."""

import re
import subprocess
import sys

import pytest

from kernels.backend import select


def test_cpu_is_computed_by_the_compiled_kernels() -> None:
    backend = select("cpu")
    assert backend.name == f"cpu ({backend.instruction_set})"
    assert backend.instruction_set in ("scalar", "avx2", "avx512", "avx512bf16")
    assert backend.abi_version == 5


def test_the_reference_is_chosen_by_its_name() -> None:
    backend = select("cpu-reference")
    assert backend.name == "cpu (reference)"
    assert backend.abi_version == 5
    assert re.fullmatch(r"[a-z0-9_]+( [a-z0-9_]+)*-torch\d+\.\d+", backend.instruction_set)


@pytest.mark.parametrize("device", ["cuda", "CPU", "", "cpu:0"])
def test_a_device_nothing_computes_on_is_refused_by_name(device: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"no backend computes on device {device!r}; supported: cpu, cpu-reference")
    ):
        select(device)


def test_the_package_imports_neither_torch_nor_anything_of_the_project() -> None:
    script = (
        "import sys, kernels, kernels.rope; "
        "print({'torch', 'engine', 'staffetta', 'kvtransfer', 'transformers'} & {m.split('.')[0] for m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_computing_imports_nothing_of_the_project() -> None:
    script = (
        "import sys; from kernels.backend import select; select('cpu'); "
        "print({'engine', 'staffetta', 'kvtransfer', 'transformers'} & {m.split('.')[0] for m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
