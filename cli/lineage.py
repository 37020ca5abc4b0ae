"""Ties a process's life to its parent's: when the parent ends, however it ends, the kernel kills the child.

Linux only, through prctl. Must be called before the process does anything that outlives it.
"""

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_MAX_NAME_BYTES: Final = 15


def die_with_parent(parent_pid: int) -> None:
    """Asks for SIGKILL at the parent's end. Exits at once when the parent has ended already.

    `parent_pid` is what the parent calls itself: between fork and this call it may have gone, and the kernel tells only
    of ends to come. The parent's thread that forked must live as long as the parent.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(128 + signal.SIGKILL)


def name_process(name: str) -> None:
    """Sets the name that `ps` and `top` show; cut to 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:_MAX_NAME_BYTES]))


def _prctl(option: int, argument: int | ctypes.c_char_p) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
