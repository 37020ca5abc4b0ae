"""Stops every server but the one whose turn it is, so that a peer whose idle threads spin does not slow the others.

`python -m bench.serve … --freeze NAME=PID`: the process and all its descendants get SIGSTOP outside the turns of server
NAME and SIGCONT before them. After the run, an error, Ctrl-C, SIGTERM and SIGHUP all of them run again; after a signal
that nobody can handle, SIGKILL above all, `kill -CONT` is the operator's. It never ends a process, and never touches
one that is not the operator's own.
"""

import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self

from bench.processes import Process, cpu_seconds, owner, process_tree, read_process
from bench.target import TargetError
from staffetta.exits import UsageError

STOP_S: Final = 10.0
"""How long a process may take to stop: one that waits for a device stops when the device has answered."""
SETTLE_S: Final = 60.0
_LOOK_S: Final = 0.001
_SETTLE_LOOK_S: Final = 1.0
_REST_SHARE: Final = 0.1
"""Of one core: what several idle servers take together, and less than any of them takes that has work."""
_STOPPED: Final = frozenset("TtZX")


def settle(pids: Collection[int]) -> None:
    """Waits until the processes and their descendants are at rest, SETTLE_S at most: a server that has just started may
    still prepare itself, and one that is stopped meanwhile would go on with that in its turns. One that never rests is
    what freezing is for.
    """
    end = time.monotonic() + SETTLE_S
    is_busy = bool(pids)
    while is_busy and time.monotonic() < end:
        before = cpu_seconds(pids)
        time.sleep(_SETTLE_LOOK_S)
        is_busy = cpu_seconds(pids) - before > _REST_SHARE * _SETTLE_LOOK_S


def parse_freezes(texts: Collection[str], names: Collection[str]) -> dict[str, int]:
    """Reads `NAME=PID`, each of a server among `names`: name to process id. Raises UsageError."""
    freezes: dict[str, int] = {}
    for text in texts:
        name, _, pid = text.rpartition("=")
        if name not in names or name in freezes or not pid.isdecimal():
            raise _refused(
                f"--freeze {text!r} names no server and process",
                f"it is NAME=PID, once for a server; the servers are {', '.join(names)}",
            )
        freezes[name] = int(pid)
    return freezes


class Turns:
    """Who may run: the servers in `freezes`, name to process id, in their turns alone; all others always.

    A context manager: inside it everyone in `freezes` is stopped, after it everyone runs. One thread.
    """

    def __init__(self, freezes: Mapping[str, int]) -> None:
        """Raises UsageError for a process that is not there, belongs to someone else or contains this one."""
        self._trees = {name: _Tree(name, _checked(name, pid)) for name, pid in freezes.items()}

    @property
    def frozen(self) -> tuple[str, ...]:
        """The servers that are stopped outside their turns."""
        return tuple(self._trees)

    def __enter__(self) -> Self:
        try:
            for tree in self._trees.values():
                tree.stop()
        except BaseException:
            self._resume_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resume_all()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Lets server `name` run inside the block. Raises TargetError when its process has ended."""
        tree = self._trees.get(name)
        if tree is None:
            yield
            return
        tree.resume()
        tree.check()
        yield
        tree.stop()  # after an error everyone is about to run again, so nobody is stopped

    def _resume_all(self) -> None:
        for tree in self._trees.values():
            tree.resume()


class _Tree:
    """One server's processes. `_stopped` are those to which SIGSTOP was sent, and SIGCONT not yet."""

    def __init__(self, name: str, root: Process) -> None:
        self._name = name
        self._root = root
        self._stopped: dict[tuple[int, int], Process] = {}

    def check(self) -> None:
        """Raises TargetError when the process that was named has ended."""
        if not _is_there(self._root):
            raise TargetError(f"the process {self._root.pid} of {self._name} has ended")

    def stop(self) -> None:
        """Stops parents before children, and looks again until nobody is left whom one of them started meanwhile.

        Returns when all have stopped. Raises TargetError when one has not after STOP_S.
        """
        self.check()
        end = time.monotonic() + STOP_S
        while awake := [each for each in process_tree(self._root.pid) if each.state not in _STOPPED]:
            for process in awake:
                self._stopped[process.key] = process
                _signal(process, signal.SIGSTOP)
            if time.monotonic() > end:
                raise TargetError(f"{self._name}: process {awake[0].pid} has not stopped after {STOP_S:g} s")
            time.sleep(_LOOK_S)

    def resume(self) -> None:
        """Lets everyone run again, children first: those who were stopped, though their parent be gone by now, and
        those whom an earlier run left stopped."""
        stopped = dict(self._stopped)
        if _is_there(self._root):
            stopped |= {each.key: each for each in process_tree(self._root.pid)}
        for process in reversed(stopped.values()):
            _signal(process, signal.SIGCONT)
        self._stopped.clear()


def _signal(process: Process, number: signal.Signals) -> None:
    """Signals that very process; does nothing when it has ended, or its id is another's by now."""
    if _is_there(process):
        with suppress(ProcessLookupError):  # it ended just now
            os.kill(process.pid, number)


def _is_there(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.key == process.key and now.state != "Z"


def _checked(name: str, pid: int) -> Process:
    process, user = read_process(pid), owner(pid)
    if process is None or user is None or process.state == "Z":
        raise _refused(f"--freeze {name}={pid}: there is no process {pid}", "a server is frozen by the id it runs as")
    if user != os.geteuid():
        raise _refused(
            f"--freeze {name}={pid}: process {pid} is not yours", f"it runs as user {user}, you are {os.geteuid()}"
        )
    if any(each.pid == os.getpid() for each in process_tree(pid)):
        raise _refused(
            f"--freeze {name}={pid}: this command descends from process {pid}", "it would stop itself and never resume"
        )
    return process


def _refused(what: str, why: str) -> UsageError:
    fix = "--freeze vllm=$(pgrep -of vllm.entrypoints), with the NAME that the server has on this command line"
    return UsageError("BAD_FREEZE", what, why=why, fix=fix)
