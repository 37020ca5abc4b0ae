"""Options of the contract's tests: how much to run, and which build of the kernels to run it on."""

from pathlib import Path

import pytest

from kernels.cpu import LIBRARY_PATH
from kernels.cpu.backend import CpuBackend
from kernels.cpu.library import InstructionSet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every size instead of a selection")
    parser.addoption("--kernels", default=str(LIBRARY_PATH), help="the shared library to test")


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full", default=False))


@pytest.fixture(scope="session")
def library_path(request: pytest.FixtureRequest) -> Path:
    return Path(str(request.config.getoption("--kernels", default=str(LIBRARY_PATH))))


BEST = InstructionSet(CpuBackend(threads=1).isa)


COMBINATIONS = [(BEST, 1), (BEST, 2), (BEST, 3), *((isa, 2) for isa in InstructionSet if isa < BEST)]


@pytest.fixture(params=COMBINATIONS, ids=lambda pair: f"{pair[0].name.lower()}-{pair[1]}")
def backend(request: pytest.FixtureRequest, library_path: Path) -> CpuBackend:
    """The best instruction set of this machine on one, two and three threads, every other one on two."""
    isa, threads = request.param
    return CpuBackend(threads=threads, instruction_set=isa, library_path=library_path)


@pytest.fixture(scope="session")
def alone(library_path: Path) -> CpuBackend:
    """What every other backend is compared with: the best instruction set on one thread."""
    return CpuBackend(threads=1, library_path=library_path)
