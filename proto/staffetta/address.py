"""Addresses as settings and peers write them: host:port, or [host]:port for IPv6.

One parser for all of them, and one refusal to listen. Nothing here resolves a name or opens a socket.
"""

import errno
import ipaddress
import re
import socket
from typing import Final, NamedTuple

from staffetta.exits import PortError

_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):([0-9]{1,5})")
_MAX_PORT: Final = 65535


class Address(NamedTuple):
    """Where something listens; as a plain pair it is what IPv4 and IPv6 sockets take."""

    host: str
    """Without brackets."""
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        """IPv6 for a host with colons; names and dotted hosts are IPv4."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it. Of names `localhost` alone is known to be so."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address that `text` writes. Raises ValueError, which says the text again, when it is neither form."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[3]) > _MAX_PORT:
        raise ValueError(f"{text!r} is not host:port")
    return Address(match[1] or match[2], int(match[3]))


def cannot_listen(address: Address, error: Exception, *, flag: str) -> PortError:
    """The refusal for an `address` that could not be listened on; `flag` is the flag that chooses another."""
    code = error.errno if isinstance(error, OSError) else None
    if code not in (None, errno.EADDRINUSE):
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return PortError("BAD_ADDRESS", f"{address} cannot be listened on", why=why.lower(), fix=f"{flag} 127.0.0.1:0")
    why = "another process listens there; it may be an earlier start of this one"
    if code is None:  # gRPC does not say which
        why += ", or the address is not this machine's"
    return PortError("PORT_IN_USE", f"{address} is taken", why=why, fix=f"{flag} {address._replace(port=0)}")
