"""A whole system as its users start it: `staffetta serve` as a process, on free ports, in a temporary directory.

`Cluster` is a context manager. It knows the doors, the workers with their processes and counts, and the log; it can
send signals to any process. However its block ends, no process of it and no file is left; when something had been, that
is an AssertionError.
"""

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
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import psutil

from staffetta.v1 import common_pb2, control_pb2, control_pb2_grpc, registry_pb2, registry_pb2_grpc
from tests.e2e.serve_log import ServeLog
from tests.e2e.waiting import wait_until

START_S: Final = 90.0
END_S: Final = 30.0
_CALL_S: Final = 5.0
_ELEMENT_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}

Load = control_pb2.GetLoadResponse


class Cluster:
    """One `staffetta serve` of `model` with `flags`, and `environ` on top of this process's environment."""

    def __init__(self, *flags: str, environ: Mapping[str, str] | None = None, model: str = "demo") -> None:
        self.model = model
        self.flags = flags
        self.environ = dict(environ or {})
        self.ready: dict[str, Any] = {}
        """What serve said of itself when it was ready."""
        self.start_s = 0.0
        """From the start of the process to its ready block."""

    @property
    def command(self) -> str:
        """The command line, for people."""
        return shlex.join(["staffetta", "serve", self.model, *self.flags])

    @property
    def http(self) -> str:
        """host:port of the REST door."""
        return str(self.ready["http"])

    @property
    def grpc(self) -> str:
        """host:port of the gRPC door."""
        return str(self.ready["grpc"])

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="e2e-"))
        started = time.monotonic()
        doors = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("staffetta"), "serve", self.model, "--json", *doors, *self.flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Every process of this system inherits TMPDIR, and no other one has this value: it finds those left behind.
            env={**os.environ, **self.environ, "TMPDIR": str(self._directory)},
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.log = ServeLog(self.process.stderr)
        try:
            line = self._first_line(started + START_S)
            assert line, f"{self.command} ended with {self.process.wait(END_S)} before it was ready:\n{self.log.tail()}"
            self.ready = json.loads(line)
        except BaseException:
            self._end()
            raise
        self.start_s = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        left = self._end()
        assert error is not None or left == [], f"left behind by {self.command}: {left}"

    # Processes

    def processes(self) -> dict[str, psutil.Process]:
        """Every living process of the system by the name that `ps` shows: gateway, zygote, prefill-0, decode-0…"""
        with contextlib.suppress(psutil.NoSuchProcess):
            return {
                child.name(): child
                for child in psutil.Process(self.process.pid).children(recursive=True)
                if child.status() != psutil.STATUS_ZOMBIE
            }
        return {}

    def signal(self, name: str, number: signal.Signals) -> int:
        """Sends a signal to the process that has `name` now, and returns its pid."""
        process = self.processes()[name]
        process.send_signal(number)
        return process.pid

    def survivors(self) -> list[str]:
        """Processes of this system that live although serve has ended, waiting a moment for those that are ending."""
        deadline = time.monotonic() + 2.0
        while (found := self._marked()) and time.monotonic() < deadline:
            psutil.wait_procs(found, timeout=0.1)
        return [_describe(process) for process in found]

    def stop(self) -> int:
        """Ctrl-C; the exit code once everything has ended."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(END_S)

    # Counts

    def workers(self) -> dict[str, registry_pb2.RegisteredWorker]:
        """The registered workers by name."""
        with grpc.insecure_channel(self.grpc) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            listed = stub.ListWorkers(registry_pb2.ListWorkersRequest(), timeout=_CALL_S)
        return {worker.announcement.identity.worker_id: worker for worker in listed.workers}

    def load(self, name: str) -> Load:
        """What one worker holds now."""
        return _load_at(self.workers()[name].announcement.address)

    def loads(self) -> dict[str, Load]:
        """What every worker holds now."""
        return {name: _load_at(worker.announcement.address) for name, worker in self.workers().items()}

    def wait_until_idle(self, *, timeout_s: float = 10.0) -> dict[str, Load]:
        """The loads once no worker holds a block, a sequence or a hand-off; AssertionError when that never is."""
        return wait_until(
            self.loads, lambda loads: bool(loads) and all(map(is_idle, loads.values())), timeout_s=timeout_s
        )

    def wait_until_linked(self, *, timeout_s: float = 20.0) -> None:
        """Returns once every decode worker that serve started is linked to every prefill worker it started."""
        names = [worker["name"] for worker in self.ready["workers"]]
        prefill = {name for name in names if name.startswith("prefill")}
        decode = [name for name in names if name.startswith("decode")]

        def is_linked(workers: dict[str, registry_pb2.RegisteredWorker]) -> bool:
            return all(
                name in workers
                and workers[name].has_session
                and prefill <= {link.prefill_worker for link in workers[name].links}
                for name in decode
            )

        wait_until(self.workers, is_linked, timeout_s=timeout_s)

    # Ends

    def _first_line(self, deadline: float) -> str:
        """Serve's first line of output: its ready block, or nothing when it ended."""
        assert self.process.stdout is not None
        is_readable, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert is_readable, f"{self.command} is not ready after {START_S:g} s:\n{self.log.tail()}"
        return self.process.stdout.readline()

    def _marked(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("TMPDIR") == str(self._directory):
                    found.append(process)
        return found

    def _end(self) -> list[str]:
        """Ends whatever lives and removes whatever is left; returns what that was."""
        is_overdue = self.process.poll() is None
        if is_overdue:
            self.process.kill()
        self.process.wait()
        left = [f"serve itself, {END_S:g} s after Ctrl-C"] if is_overdue else []
        left += self.survivors()
        for process in self._marked():
            process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        # A killed serve cannot tidy up; the next one on the same machine does.
        was_killed = self.process.returncode == -signal.SIGKILL
        left += [] if was_killed else [str(path) for path in self._directory.iterdir()]
        for path in sorted(self._directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self._directory.rmdir()
        return left


def is_idle(load: Load) -> bool:
    """Whether the worker holds nothing for anybody."""
    kept = load.held_blocks + load.quarantined_blocks + load.num_running + load.num_waiting + load.num_held
    return kept == 0 and load.free_blocks + load.cached_blocks == load.total_blocks


def block_bytes(layout: common_pb2.KVLayout) -> int:
    """Bytes of the KV of one full block: keys and values of every layer and head."""
    return sum(
        2 * group.num_layers * group.num_kv_heads * group.head_dim * group.block_size * _ELEMENT_BYTES[group.dtype]
        for group in layout.groups
    )


def _load_at(address: str) -> Load:
    with grpc.insecure_channel(address) as channel:
        load: Load = control_pb2_grpc.ControlServiceStub(channel).GetLoad(control_pb2.GetLoadRequest(), timeout=_CALL_S)
        return load


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.name()} (pid {process.pid}, {process.status()})"
    return f"pid {process.pid}"
