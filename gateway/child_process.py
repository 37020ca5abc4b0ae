"""One life of a child process: its start with the inherited sockets, signals, the wait for its end. Event loop only.

Started by vfork and exec alone: the parent has threads inside gRPC, and a copy of it must run none of their code.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys

from staffetta.config.environment import child_environment


class ChildProcess:
    """A process that was started, until it is gone."""

    def __init__(self, *, link: socket.socket, listener: socket.socket) -> None:
        """Starts a child with its end of the link and its listening socket; both stay the caller's here.

        Raises OSError when the system has no room for it; then there is none.
        """
        inherited = (link.fileno(), listener.fileno())
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our module, numbers
            [sys.executable, "-m", "gateway.child", *map(str, inherited)],
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
            env=child_environment(),
        )
        try:
            self._descriptor = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless it has ended."""
        self._process.send_signal(number)

    async def wait(self) -> int:
        """Returns when it has ended: its exit code, or minus the number of the signal that ended it. Once."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        return self._process.wait()
