"""Building, loading and choosing the compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.backend import BackendUnavailableError
from kernels.cpu import library
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import InstructionSet, load


def test_a_library_that_is_not_built_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"libgone\.so is missing\): run `make setup`"):
        load(tmp_path / "libgone.so")


def test_a_library_from_before_a_function_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library._FUNCTIONS, "new", (None, ()))
    with pytest.raises(BackendUnavailableError, match="have no new, they are old: run `make setup`"):
        load()


def test_a_library_with_another_layout_of_a_step_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "StepJob", library.StepCall)
    with pytest.raises(BackendUnavailableError, match="another layout of a step, they are old: run `make setup`"):
        load()


def test_an_instruction_set_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda path: SimpleNamespace(staffetta_instruction_set=lambda: 1))
    with pytest.raises(ValueError, match="has avx2 at best, not avx512"):
        CpuBackend(threads=1, instruction_set=InstructionSet.AVX512)


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="threads is 0, needs at least 1"):
        CpuBackend(threads=0)


def test_rows_of_another_width_are_refused() -> None:
    layer = CpuBackend(threads=1).prepare_linear(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\[2, 5\], the layer takes \[rows, 4\]"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"residual has shape \[1, 3\], the result \[2, 3\]"):
        layer(torch.zeros(2, 4), residual=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least one input"):
        CpuBackend(threads=1).prepare_linear(torch.zeros(3, 0))


def test_loading_starts_no_thread_and_leaves_the_environment_alone() -> None:
    script = (
        "import os; from kernels.cpu.backend import CpuBackend; before = len(os.listdir('/proc/self/task')); "
        "CpuBackend(threads=4); "
        "print(len(os.listdir('/proc/self/task')) - before, 'OMP_WAIT_POLICY' in os.environ)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == ["0", "False"]


def test_a_prepared_layer_keeps_nothing_of_the_weight() -> None:
    weight = torch.ones(2, 3)
    layer = CpuBackend(threads=1).prepare_linear(weight)
    weight.zero_()
    assert layer(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
