"""Listening addresses that several processes of one server share, and nobody else.

The kernel spreads connections evenly over the sockets of a port by their addresses. The first socket is bound as the
only one, so that a taken port is an error and no silent partner; only then are others let in.
"""

import socket
from typing import Final

from staffetta.address import Address, cannot_listen

BACKLOG: Final = 2048


def hold(address: Address, *, flag: str) -> socket.socket:
    """A socket that keeps `address` for this user's sharing processes without listening: no connection comes to it.

    Raises PortError for an address that is taken or not ours; `flag` is the flag that chooses another.
    """
    holder = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
        # After the bind: it was refused beside any other socket, and what is bound from now on may share. The first of
        # the two options was for connections of an earlier process that linger, and would let in a second holder.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        holder.close()
        raise cannot_listen(address, error, flag=flag) from error
    return holder


def listen(address: Address) -> socket.socket:
    """One listening socket of an address that this process holds. Raises OSError."""
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    send_at_once(listener)
    return listener


def send_at_once(listener: socket.socket) -> None:
    """Makes small frames leave unacknowledged ones behind: accepted sockets inherit it. Else they wait for 40 ms."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
