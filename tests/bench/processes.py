"""Little real processes for tests: a parent that starts a child and tells its id, and what state they are in."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bench.processes import read_process

_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
input()
child.stdin.close()
child.wait()
"""


@contextmanager
def parent_and_child() -> Iterator[tuple[int, int]]:
    """The ids of a process and of the one that it started; both end with the block, stopped or not."""
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            yield parent.pid, child
        finally:
            parent.stdin.close()  # the child's input ends with its parent, however that ends
            if states(parent.pid) == "T":
                parent.kill()


def states(*pids: int) -> str:
    """One letter for each process; a dash for one that has ended."""
    found = (read_process(pid) for pid in pids)
    return "".join("-" if each is None or each.state == "Z" else "T" if each.state == "T" else "r" for each in found)
