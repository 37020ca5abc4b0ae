"""The supervisor's end of a zygote: starts it, has it fork workers, and hears of their ends."""

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from cli.logs import LogRelay
from cli.messages import MAX_MESSAGE_BYTES, Ended, Fork, Forked, Imported, Refused, Signal, decode_reply, encode
from staffetta.config.environment import child_environment


class ZygoteLostError(Exception):
    """The zygote ended, and every worker with it."""


class ForkRefusedError(Exception):
    """The zygote would not fork."""


class ZygoteLink:
    """One zygote, from its start to its end. Event loop only."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._process = process
        self._control = control
        self._imported: asyncio.Future[None] = loop.create_future()
        self._forking: dict[str, asyncio.Future[int]] = {}
        self._ending: dict[int, asyncio.Future[int]] = {}  # by pid, workers whose end nobody has asked for or that live
        self._listener = asyncio.create_task(self._listen(), name="zygote")

    @classmethod
    async def start(cls, entries: Sequence[str], *, variables: dict[str, str], relay: LogRelay) -> "ZygoteLink":
        """Starts a zygote that imports `entries` (module:name), with `variables` in its environment."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs, relay.pipe("zygote") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cli.zygote", "--parent", str(os.getpid()), "--control", str(theirs.fileno()), *entries),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
                env=child_environment(**variables),
            )
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """The zygote's process."""
        return self._process.pid

    async def wait_until_imported(self) -> None:
        """Returns when the zygote takes commands. Raises ZygoteLostError when it ends before."""
        await self._imported

    async def fork(self, command: Fork, *, log: int) -> int:
        """Starts a worker that writes to `log`; returns its pid. Raises ForkRefusedError or ZygoteLostError."""
        forked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forking[command.name] = forked
        try:
            socket.send_fds(self._control, [encode(command)], [log])
        except OSError as error:
            raise ZygoteLostError from error
        return await forked

    async def wait_for_end(self, pid: int) -> int:
        """The worker's exit code, or minus the signal; asked once for each worker. Raises ZygoteLostError."""
        status = await self._ending[pid]
        del self._ending[pid]
        return status

    def signal(self, pid: int, number: int) -> None:
        """Sends a worker a signal, unless it has ended."""
        if pid in self._ending and not self._ending[pid].done():
            self._control.send(encode(Signal(pid, number)))

    async def wait(self) -> int:
        """Waits for the zygote's own end; its exit code, or minus the signal."""
        status = await self._process.wait()
        await self._listener
        return status

    def kill(self) -> None:
        """Ends the zygote, and through the kernel every worker, at once."""
        if self._process.returncode is None:
            self._process.kill()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        with self._control:
            while packet := await self._receive(loop):
                match decode_reply(packet):
                    case Imported():
                        self._imported.set_result(None)
                    case Forked(name=name, pid=pid):
                        self._ending[pid] = loop.create_future()
                        self._forking.pop(name).set_result(pid)
                    case Refused(name=name, why=why):
                        self._forking.pop(name).set_exception(ForkRefusedError(why))
                    case Ended(pid=pid, status=status):
                        self._ending[pid].set_result(status)
        waiting: list[asyncio.Future[Any]] = [self._imported, *self._forking.values(), *self._ending.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(ZygoteLostError())
                future.exception()  # marks it as seen: nobody may be waiting

    async def _receive(self, loop: asyncio.AbstractEventLoop) -> bytes:
        try:
            return await loop.sock_recv(self._control, MAX_MESSAGE_BYTES)
        except ConnectionError:
            return b""
