"""Looks at a listening address before anything is started, so that a taken port is told at once."""

import socket

from staffetta.address import cannot_listen, parse_address


def choose_port(text: str, flag: str) -> str:
    """The address `text` (host:port) with a port that is free now; port 0 is replaced by a free one.

    Nothing is reserved: another process may take the port before its user does, which then says so itself. Raises
    PortError for an address that is taken or not ours; `flag` is the flag that chooses another.
    """
    address = parse_address(text)
    with socket.socket(address.family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise cannot_listen(address, error, flag=flag) from None
        return str(address._replace(port=probe.getsockname()[1]))
