"""Looks at a listening address before anything is started, so that a taken port is told at once."""

import errno
import socket

from staffetta.exits import PortError


def choose_port(address: str, flag: str) -> str:
    """`address` (host:port) with a port that is free now; port 0 is replaced by a free one.

    Nothing is reserved: another process may take the port before its user does, which then says so itself. Raises
    PortError for an address that is taken or not ours; `flag` is the flag that chooses another.
    """
    host, _, port = address.rpartition(":")
    bare_host = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bare_host, int(port)))
            probe.listen(1)
        except OSError as error:
            raise _refused(address, flag, error) from None
        return f"{host}:{probe.getsockname()[1]}"


def _refused(address: str, flag: str, error: OSError) -> PortError:
    host = address.rpartition(":")[0]
    if error.errno == errno.EADDRINUSE:
        return PortError(
            "PORT_IN_USE",
            f"{address} is taken",
            why="another process listens there; it may be an earlier start of this one",
            fix=f"{flag} {host}:0 (takes a free port)",
        )
    why = (error.strerror or str(error)).lower()
    return PortError("BAD_ADDRESS", f"{address} cannot be listened on", why=why, fix=f"{flag} 127.0.0.1:0")
