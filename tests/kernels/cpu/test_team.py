"""The threads of the compiled kernels: who computes never matters, and nobody is left over."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kernels.cpu.backend import CpuBackend

ROWS, INPUTS, OUTPUTS = 40, 96, 352
"""Large enough to be shared out: rows are packed by several threads, panels multiplied by several."""


def product(threads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    return CpuBackend(threads=threads).prepare_linear(weight)(torch.randn(ROWS, INPUTS, generator=generator))


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


class Member(NamedTuple):
    """A thread of a team, as the kernel sees it: R or S, and its processor time."""

    state: str
    ticks: int


def members() -> list[Member]:
    """All of this process."""
    stats = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            stats.append((task / "stat").read_text().rpartition(")"))
    named = [after.split() for before, _, after in stats if before.endswith("(kernels")]
    return [Member(fields[0], int(fields[11])) for fields in named]


def until(is_reached: Callable[[], bool], work: Callable[[], None]) -> None:
    """Works until it is; for a minute."""
    deadline = time.monotonic() + 60
    while not is_reached():
        assert time.monotonic() < deadline, members()
        work()


def _in_a_thread_of_its_own(threads: int) -> None:
    worker = threading.Thread(target=product, args=(threads,))
    worker.start()
    worker.join()


def _run(script: str) -> "subprocess.CompletedProcess[str]":
    names = "INPUTS, OUTPUTS, ROWS, CpuBackend, Path, os, product, torch"
    command = [sys.executable, "-c", f"from tests.kernels.cpu.test_team import {names}\n{script}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_a_team_of_any_size_computes_what_one_thread_does(threads: int) -> None:
    alone = product(1)
    assert all(torch.equal(product(threads), alone) for _ in range(20))


def test_callers_have_teams_of_their_own() -> None:
    alone = product(1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(product, [2, 3, 2, 3] * 25))
    assert all(torch.equal(result, alone) for result in results)


def test_a_team_ends_with_the_thread_that_called() -> None:
    _in_a_thread_of_its_own(3)
    before = num_threads()
    for _ in range(10):
        _in_a_thread_of_its_own(4)
    deadline = time.monotonic() + 10
    while num_threads() > before and time.monotonic() < deadline:  # Python's join returns while a thread still ends
        os.sched_yield()
    assert num_threads() <= before


def test_members_compute_and_then_sleep() -> None:
    run = _run(
        "from tests.kernels.cpu.test_team import members, until\n"
        "layer = CpuBackend(threads=3).prepare_linear(torch.ones(4096, 512))\n"
        "def work(): layer(torch.ones(64, 512))\n"
        "until(lambda: len(members()) == 2 and all(member.ticks > 0 for member in members()), work)\n"
        "until(lambda: {member.state for member in members()} == {'S'}, os.sched_yield)\n"
        "print('ok')\n"
    )
    assert run.stdout.split() == ["ok"], run.stderr


def test_a_forked_child_computes_with_a_team_of_its_own() -> None:
    run = _run(
        "before = product(2)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(product(3), before) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(product(2), before))\n"
    )
    assert run.stdout.split() == ["0", "True"], run.stderr


def test_a_thread_that_cannot_be_started_is_an_error_and_the_next_call_works() -> None:
    run = _run(
        "import resource\n"
        "backend = CpuBackend(threads=1)\n"
        "layer = backend.prepare_linear(torch.ones(OUTPUTS, INPUTS))\n"
        "x = torch.ones(ROWS, INPUTS)\n"
        "expected = layer(x)\n"
        "backend.threads = 2\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "limits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, limits[1]))\n"
        "try: layer(x)\n"
        "except RuntimeError as error: print('starts no more threads' in str(error))\n"
        "resource.setrlimit(resource.RLIMIT_AS, limits)\n"
        "print(torch.equal(layer(x), expected))\n"
    )
    assert run.stdout.split() == ["True", "True"], run.stderr


def test_a_member_without_memory_for_scratch_is_an_error_and_the_next_call_works() -> None:
    run = _run(
        "import resource; from ctypes import byref\n"
        "from kernels.cpu.library import NO_MATRIX, Status, matrix; from tests.kernels.cpu.test_team import until\n"
        "backend, expected = CpuBackend(threads=1), product(2)\n"
        "x, weight = torch.ones(8, 2**22), torch.ones(2**22)\n"
        "out, none = torch.empty_like(x), byref(NO_MATRIX)\n"
        "def norm(threads): return backend.library.staffetta_rms_norm(\n"
        "    backend.isa, threads, byref(matrix(x)), none, byref(matrix(weight)), 0.0, none, byref(matrix(out)))\n"
        "print(norm(1) == Status.OK)\n"  # the caller has its scratch now, the member has not
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "limits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, limits[1]))\n"
        "until(lambda: norm(2) == Status.OUT_OF_MEMORY, os.sched_yield)\n"
        "resource.setrlimit(resource.RLIMIT_AS, limits)\n"
        "print(norm(2) == Status.OK, torch.equal(product(2), expected))\n"
    )
    assert run.stdout.split() == ["True"] * 3, run.stderr
