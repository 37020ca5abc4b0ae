"""Remembers model digests: hashing gigabytes again, in every process of every start, would cost seconds.

A digest is remembered with what the kernel says of each file: device, inode, size, times of the last write and of the
last change. Writing changes the last of these, and nobody can set it back. Files that changed a moment ago are not
remembered: they may change again within one tick of the clock.
"""

import hashlib
import logging
import re
import time
from pathlib import Path
from typing import Final

from staffetta.cache_dir import CacheDirectory
from staffetta.identity import model_digest, model_files

_SETTLED_S: Final = 2.0
"""How long a file must have been left alone; clocks of file systems tick in milliseconds, at worst in one or two s."""
_WAIT_S: Final = 60.0
_RECORD: Final = re.compile(rb"([0-9a-f]{64}) ([0-9a-f]{64})\n")

log = logging.getLogger(__name__)


def remembered_digest(directory: Path, cache: CacheDirectory | None) -> str:
    """`staffetta.identity.model_digest`, with its errors; from `cache` where it is there for these very files."""
    if cache is None:
        return model_digest(directory)
    name = f"{hashlib.blake2b(bytes(directory.resolve()), digest_size=16).hexdigest()}.digest"
    try:
        if (found := _read(cache, name, _facts(directory))) is not None:
            return found
        with cache.turn(name, wait_s=_WAIT_S):
            facts = _facts(directory)
            if (found := _read(cache, name, facts)) is not None:
                return found
            # What changes from here on has other facts than these, whatever is hashed.
            is_settled = _is_settled(directory)
            digest = model_digest(directory)
            if is_settled:
                with cache.replace(name) as file:
                    file.write(f"{facts} {digest}\n".encode())
            return digest
    except OSError as error:
        log.warning("the model's digest is not remembered: %s", error)
        return model_digest(directory)


def _read(cache: CacheDirectory, name: str, facts: str) -> str | None:
    file = cache.open(name)
    if file is None:
        return None
    with file:
        record = _RECORD.fullmatch(file.read(256))
    return record[2].decode() if record is not None and record[1].decode() == facts else None


def _facts(directory: Path) -> str:
    """What the kernel says of the files that the digest reads, digested."""
    digest = hashlib.blake2b(digest_size=32)
    for name in model_files(directory):
        status = (directory / name).stat()
        numbers = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        digest.update(f"{name}\0{numbers}\n".encode())
    return digest.hexdigest()


def _is_settled(directory: Path) -> bool:
    changed = max((directory / name).stat().st_ctime for name in model_files(directory))
    return changed < time.time() - _SETTLED_S
