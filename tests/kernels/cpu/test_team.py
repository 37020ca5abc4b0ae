"""The threads of the compiled kernels: who computes never matters, and nobody is left over."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def test_a_team_without_work_sleeps() -> None:
    product(3)
    time.sleep(0.02)  # beyond the moment in which it spins; what is measured is what it takes after that
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.02


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
