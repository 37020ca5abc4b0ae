"""The zygote: a process that has imported everything a worker needs, and forks one on command.

Importing torch takes seconds; a fork takes milliseconds. So workers start, and start again after a crash, without
paying for the import, and share the imported pages. What makes the fork safe is that this process has exactly one
thread and never opened a gRPC channel; it counts its threads before every fork and refuses when there are more. It must
never compute, serve or log anything itself.

    supervisor ──(Fork + descriptor of the worker's stderr, Signal)──▶ zygote ──fork──▶ worker
    supervisor ◀──(Imported, Forked, Ended, Refused)── zygote

The control socket keeps message boundaries (SOCK_SEQPACKET). Its end, or the supervisor's, ends the zygote and with it,
through the kernel, every worker.
"""

import argparse
import faulthandler
import gc
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cli.entry import call_entry, load_entry
from cli.lineage import die_with_parent, name_process
from cli.messages import (
    MAX_MESSAGE_BYTES,
    Ended,
    Fork,
    Forked,
    Imported,
    Refused,
    Reply,
    Signal,
    decode_command,
    encode,
)
from staffetta.exits import ExitCode, run

_HANDLED = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)


class Zygote:
    """Forks workers and reports their ends. One thread."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._names: dict[int, str] = {}  # by pid, every worker that has not been reaped
        self._selector = selectors.DefaultSelector()
        # SIGCHLD's only effect is a byte here, so that the selector wakes up.
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)

    def serve(self) -> int:
        """Obeys commands until the supervisor closes the socket."""
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._send(Imported())
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake:
                    self._wake.recv(4096)
                    self._reap()
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
                if not message:
                    return ExitCode.OK
                self._obey(decode_command(message), descriptors)

    def _obey(self, command: Fork | Signal, descriptors: Sequence[int]) -> None:
        match command:
            case Signal(pid=pid, number=number):
                if pid in self._names:  # reaped ones are not in it, so the pid cannot be somebody else's
                    os.kill(pid, number)
            case Fork(name=name):
                num_threads = count_threads()
                if num_threads != 1:
                    self._send(Refused(name, f"the zygote has {num_threads} threads; a fork would copy their locks"))
                else:
                    self._fork(command, stderr=descriptors[0])
                os.close(descriptors[0])

    def _fork(self, command: Fork, *, stderr: int) -> None:
        zygote_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(command, zygote_pid, stderr)
        self._names[pid] = command.name
        self._send(Forked(command.name, pid))

    def _become_worker(self, command: Fork, zygote_pid: int, stderr: int) -> NoReturn:
        """Runs in the child, which must never return into the zygote's loop, hence `_exit` on every way out."""
        code: int = ExitCode.FAILURE
        try:
            die_with_parent(zygote_pid)
            name_process(command.name)
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in _HANDLED:
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            for end in (self._control, self._wake, self._waker):
                end.close()
            os.dup2(stderr, 1)
            os.dup2(stderr, 2)
            faulthandler.enable()
            code = run(lambda: call_entry(command.entry, command.role, command.config))
        except BaseException:  # noqa: BLE001 (nothing above may see it: above is the zygote's own loop)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._names:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._send(Ended(self._names.pop(pid), pid, os.waitstatus_to_exitcode(status)))

    def _send(self, reply: Reply) -> None:
        self._control.send(encode(reply))


def count_threads() -> int:
    """This process's threads, as the kernel counts them: those of native libraries too."""
    return len(list(Path("/proc/self/task").iterdir()))


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """A handler, because an ignored SIGCHLD would have the kernel reap the workers."""


def main(argv: Sequence[str]) -> int:
    """Runs a zygote: `--parent PID --control FD ENTRY…`, started by the supervisor only."""
    parser = argparse.ArgumentParser(prog="cli.zygote")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("entries", nargs="*", metavar="ENTRY")
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.parent)
    name_process("zygote")
    control = socket.socket(fileno=arguments.control)
    for entry in arguments.entries:
        load_entry(entry)
    gc.collect()
    gc.freeze()  # what is alive now is shared with every worker for as long as the collector leaves it alone
    return Zygote(control).serve()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
