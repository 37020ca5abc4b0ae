"""Tells whether two `serve` of one host keep their workers on the same CPUs: each claims those that it pins them to.

A claim is a name that the kernel keeps while its holder lives, an abstract Unix socket, so nothing is ever left behind.
It is a notice and no lock: nothing is refused, and containers with networks of their own do not see each other's.
"""

import errno
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def claim_cpus(cpus: Iterable[int]) -> Iterator[frozenset[int]]:
    """Claims CPUs for as long as the block runs; gives those of them that another process has claimed before.

    Where the system refuses one, none stays claimed: for want of such names, or of descriptors, which others need more.
    """
    taken: set[int] = set()
    with ExitStack() as stack:
        for cpu in cpus:
            try:
                claim = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                claim.bind(f"\0staffetta-cpu-{cpu}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    stack.close()
                    break
                taken.add(cpu)
        yield frozenset(taken)
