"""A private directory for the sockets of one `serve`, removed at its end; what a killed one left, at the next start.

A lock on a file inside tells whether the owner lives: the kernel lets go of it however the owner ends.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from staffetta.exits import UsageError

_PREFIX: Final = "staffetta-"
_LOCK: Final = "lock"
_MAX_SOCKET_PATH_BYTES: Final = 107
_ROOM_FOR_NAME: Final = 40
"""What a socket's name may take behind the directory: a worker's name and what the transport adds."""


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory that only this user can enter. Raises UsageError when its path is too long for sockets."""
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        _check_length(path)
        # Locked before it has the name that others look at, so that nobody takes it for an abandoned one.
        with (path / f"new-{_LOCK}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path / f"new-{_LOCK}").rename(path / _LOCK)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        # Not ours to enter, being made or removed by its owner just now, or locked: each means leave it alone.
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.getuid():
                continue
            with (path / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


def _check_length(path: Path) -> None:
    length = len(os.fsencode(path))
    if length + _ROOM_FOR_NAME > _MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            "PATH_TOO_LONG",
            f"the temporary directory {path.parent} is too deep for Unix sockets",
            why=f"its path takes {length} of the {_MAX_SOCKET_PATH_BYTES} bytes that a socket's path may have",
            fix="TMPDIR=/tmp staffetta serve",
        )
