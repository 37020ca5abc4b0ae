"""Our own server for a measurement: `staffetta serve` as a process of its own, on free ports, ended with its block."""

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

START_S: Final = 180.0
END_S: Final = 30.0
_LAST_BYTES: Final = 2000


class ServerEndedError(RuntimeError):
    """The server ended, or was not ready in time; the message ends with what it last wrote."""


class LocalServer:
    """One `staffetta serve DIR` with `flags`; a context manager. `start_s` is from start to ready block; all its
    processes descend from `pid`."""

    def __init__(self, name: str, model: Path, flags: Sequence[str]) -> None:
        self.name = name
        self.arguments = ("serve", str(model), *flags)
        self.start_s = 0.0
        self.pid = 0
        self.http = ""
        self.grpc = ""
        self._stack = contextlib.ExitStack()

    @property
    def command(self) -> str:
        """The command line, for people."""
        return shlex.join(("staffetta", *self.arguments))

    @property
    def target(self) -> str:
        """The REST door as `bench.serve` takes it."""
        return f"{self.name}=http://{self.http}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile())
            started = time.monotonic()
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cli.main", *self.arguments),
                    *("--json", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(os.environ),
            )
            stack.callback(_end, process)
            line = _first_line(process, started + START_S)
            if not line:
                raise ServerEndedError(f"{self.command} is not ready:\n{_tail(log.fileno())}")
            ready = json.loads(line)
            self.start_s = time.monotonic() - started
            self.pid = process.pid
            self.http, self.grpc = ready["http"], ready["grpc"]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _first_line(process: "subprocess.Popen[str]", deadline: float) -> str:
    """The ready block, or nothing when the process ended or took too long."""
    if process.stdout is None:
        return ""
    is_readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
    return process.stdout.readline() if is_readable else ""


def _end(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C, and the end of it if that does not help."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _LAST_BYTES, max(0, size - _LAST_BYTES)).decode(errors="replace")
