"""A directory for what can be computed again: packed weights, digests of large files. It may be emptied at any time.

Nothing is believed that another user could have written, and nothing half written is ever seen: a file gets its name
when it is whole. Names are ours, never a client's. Locks belong to the kernel, which lets go of them however their
holder ends.
"""

import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from staffetta.config.environment import user_cache_directory
from staffetta.identity import model_files

AUTO: Final = "auto"
"""What a setting says to mean the user's own cache directory."""

LEAST_MODEL_BYTES: Final = 64 * 2**20
"""Of a model's files: what is smaller is hashed and packed in the time that a cache costs."""

_TEMPORARY_PREFIX: Final = ".new-"
_LOCK_PERIOD_S: Final = 0.02

log = logging.getLogger(__name__)


class CacheUnusableError(OSError):
    """The directory, or a file in it, is not this user's alone, or cannot be had."""


class CacheDirectory:
    """One directory. Any thread, any number of processes."""

    def __init__(self, path: Path) -> None:
        """Makes the directory where it is missing. Raises CacheUnusableError, saying why, when it cannot be used."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheUnusableError(f"{path}: {error.strerror}") from error
        _check_owned(path.stat(), path)
        self.path = path

    def open(self, name: str) -> IO[bytes] | None:
        """Opens a file for reading; None when there is none.

        Raises CacheUnusableError for one that is no regular file, not this user's, or writable by others.
        """
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheUnusableError(f"{path}: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            _check_owned(status, path)
            if not stat.S_ISREG(status.st_mode):
                raise CacheUnusableError(f"{path} is no file")
            return os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise

    @contextmanager
    def replace(self, name: str) -> Iterator[IO[bytes]]:
        """A new file to write and read, which gets `name` when the block ends without an exception, else is removed.

        It is there for others as soon as it has its name, which is before the disk has it: whoever reads it checks it
        against checksums, as after any other accident. What a killed writer left is removed. Raises OSError.
        """
        self._remove_abandoned()
        temporary = self.path / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that its writer lives
                yield file
                temporary.replace(self.path / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    @contextmanager
    def turn(self, name: str, *, wait_s: float) -> Iterator[None]:
        """One process at a time for `name`, so that others find what the first has made.

        Who has waited for `wait_s` goes on all the same: the holder may be stopped, and writing is safe anyhow. Raises
        OSError when nothing can be written here.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.path / f"{name}.lock", flags, 0o600), "r+b") as file:
            deadline = time.monotonic() + wait_s
            while not _try_lock(file) and time.monotonic() < deadline:
                time.sleep(_LOCK_PERIOD_S)
            yield

    def _remove_abandoned(self) -> None:
        for path in self.path.glob(f"{_TEMPORARY_PREFIX}*"):
            # Gone meanwhile, or not ours: leave it alone.
            with suppress(OSError), path.open("rb") as file:
                if _try_lock(file):
                    path.unlink()


def open_cache(setting: str, *, model: Path) -> CacheDirectory | None:
    """The directory that a setting names; `auto` is `staffetta` under the user's cache directory.

    None for an empty setting, for a model directory too small to gain, and, with a line in the log, when it cannot be
    used. Raises ModelNotFoundError or ModelRefusedError for the model.
    """
    if not setting or sum((model / name).stat().st_size for name in model_files(model)) < LEAST_MODEL_BYTES:
        return None
    try:
        return CacheDirectory(user_cache_directory() / "staffetta" if setting == AUTO else Path(setting))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        log.warning("nothing is cached on disk: %s", error)
        return None


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_owned(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise CacheUnusableError(f"{path} belongs to user {status.st_uid}, not to this one ({os.geteuid()})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheUnusableError(f"{path} can be written by others: chmod go-w {path}")
