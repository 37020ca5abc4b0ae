"""A `serve` with stand-ins for its children, run as a process: its output as it comes, its children by name."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

DEADLINE_S = 20.0


class RunningServe:
    """One process group's root. `wait_for_line` is how tests wait: on what the program says, never on time."""

    def __init__(self, *arguments: str, temporary: Path) -> None:
        doors = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.fake_serve", *doors, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        self.lines: list[str] = []
        self._unread: queue.Queue[str | None] = queue.Queue()
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()
        self.children: dict[str, psutil.Process] = {}

    def wait_until_ready(self) -> dict[str, Any]:
        """The ready block; from here on `children` has every process by name."""
        assert self.process.stdout is not None
        ready: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.note_children()
        return ready

    def note_children(self) -> dict[str, psutil.Process]:
        """The children that live now, by the name that `ps` shows."""
        self.children = {child.name(): child for child in psutil.Process(self.process.pid).children(recursive=True)}
        return self.children

    def wait_for_line(self, text: str) -> str:
        """The next line of standard error that contains `text`."""
        deadline = time.monotonic() + DEADLINE_S
        while (line := self._unread.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if text in line:
                return line
        raise AssertionError(f"no line says {text!r}: {self.lines}")

    def wait_for_end(self) -> int:
        """The exit code; every child that was noted must be gone with it."""
        code = self.process.wait(timeout=DEADLINE_S)
        _, alive = psutil.wait_procs(list(self.children.values()), timeout=DEADLINE_S)
        assert alive == []
        return code

    def close(self) -> None:
        """Leaves nothing behind, whatever failed."""
        self.process.kill()
        for child in self.children.values():
            if child.is_running():
                child.kill()
        self.process.wait(timeout=DEADLINE_S)
        self._reader.join(timeout=DEADLINE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.lines.append(line.rstrip("\n"))
            self._unread.put(self.lines[-1])
        self._unread.put(None)


@contextmanager
def running_serve(*arguments: str, temporary: Path) -> Iterator[RunningServe]:
    """Starts one and ends it, whatever happens."""
    serve = RunningServe(*arguments, temporary=temporary)
    try:
        yield serve
    finally:
        serve.close()
