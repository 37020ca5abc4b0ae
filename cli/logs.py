"""Relays what child processes write, line by line under each process's name, and remembers the last lines."""

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import Final

_LAST_LINES: Final = 20
_READ_BYTES: Final = 64 * 1024
_DRAIN_S: Final = 1.0


class LogRelay:
    """The children's lines, in the order they arrive. Event loop only."""

    def __init__(self) -> None:
        self._last: dict[str, deque[str]] = {}
        self._pumps: dict[str, asyncio.Task[None]] = {}  # by name, the newest process of that name

    @contextlib.contextmanager
    def pipe(self, name: str) -> Iterator[int]:
        """A descriptor for a child's stdout and stderr; ours is closed when the child has its own."""
        read_end, write_end = os.pipe()
        self._pumps[name] = asyncio.create_task(self._pump(name, read_end), name=f"log of {name}")
        try:
            yield write_end
        finally:
            os.close(write_end)

    async def drain(self, name: str) -> None:
        """Waits until everything a process wrote before its end has been relayed.

        Bounded, because a grandchild may have inherited the descriptor and keep it open.
        """
        if name in self._pumps:
            await asyncio.wait([self._pumps[name]], timeout=_DRAIN_S)

    def last_lines(self, name: str) -> list[str]:
        """The last lines of a process, oldest first."""
        return list(self._last.get(name, ()))

    async def _pump(self, name: str, descriptor: int) -> None:
        """Relays a pipe to its end. A line that is longer than one read is cut."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        pending = b""
        while chunk := await reader.read(_READ_BYTES):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._write(name, line)
            if len(pending) >= _READ_BYTES:
                self._write(name, pending)
                pending = b""
        if pending:
            self._write(name, pending)

    def _write(self, name: str, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self._last.setdefault(name, deque(maxlen=_LAST_LINES)).append(text)
        print(f"{name:<9} │ {text}", file=sys.stderr, flush=True)
