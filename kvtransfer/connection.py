"""Blocking sockets, exactly: send all of it, receive exactly that much, cut it from another thread."""

import contextlib
import socket
import time
from collections.abc import Sequence


def receive_into(connection: socket.socket, view: memoryview) -> None:
    """Fills `view` from the connection. Raises EOFError when the peer ends first, OSError when the connection fails."""
    while view:
        num_bytes = connection.recv_into(view, 0, socket.MSG_WAITALL)
        if num_bytes == 0:
            raise EOFError("the peer closed the connection")
        view = view[num_bytes:]


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """Receives `num_bytes` bytes; for small messages of a size that we chose. Raises as `receive_into`."""
    buffer = bytearray(num_bytes)
    receive_into(connection, memoryview(buffer))
    return bytes(buffer)


def receive_within(connection: socket.socket, num_bytes: int, *, timeout_s: float) -> bytes:
    """As `receive_exactly`, but all of it within `timeout_s`, else TimeoutError. Leaves the socket with a timeout."""
    deadline = time.monotonic() + timeout_s
    parts: list[bytes] = []
    while num_bytes > 0:
        # A deadline for the whole message, so that a peer cannot stretch it byte by byte.
        if (remaining_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(remaining_s)
        if not (part := connection.recv(num_bytes)):
            raise EOFError("the peer closed the connection")
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def send_views(connection: socket.socket, views: Sequence[memoryview]) -> None:
    """Sends all bytes of `views` in order, gathered by the kernel. At most IOV_MAX (1024 on Linux) views."""
    pending = list(views)
    while pending:
        num_bytes = connection.sendmsg(pending)
        while pending and num_bytes >= len(pending[0]):
            num_bytes -= len(pending.pop(0))
        if num_bytes:
            pending[0] = pending[0][num_bytes:]


def shut(connection: socket.socket) -> None:
    """Cuts the connection, so that any thread blocked in it returns at once; idempotent. Does not close the descriptor:
    the thread that uses the connection does, else its number could be reused under that thread."""
    with contextlib.suppress(OSError):  # not connected any more, or closed: what was wanted
        connection.shutdown(socket.SHUT_RDWR)
