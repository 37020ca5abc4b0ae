"""One way to read an address and one way to refuse it."""

import errno
import socket

import pytest

from staffetta.address import Address, cannot_listen, parse_address
from staffetta.exits import ExitCode

READINGS = [
    ("127.0.0.1:8000", Address("127.0.0.1", 8000), socket.AF_INET),
    ("prefill-0:0", Address("prefill-0", 0), socket.AF_INET),
    ("[::1]:65535", Address("::1", 65535), socket.AF_INET6),
    ("[::ffff:10.0.0.1]:1", Address("::ffff:10.0.0.1", 1), socket.AF_INET6),
]


@pytest.mark.parametrize(("text", "address", "family"), READINGS)
def test_an_address_is_read_and_written_the_same(text: str, address: Address, family: socket.AddressFamily) -> None:
    assert parse_address(text) == address
    assert (str(address), address.family) == (text, family)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104 - the one that must not pass for loopback
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_only_what_this_machine_alone_reaches_is_loopback(host: str, is_loopback: bool) -> None:
    assert Address(host, 1).is_loopback is is_loopback


@pytest.mark.parametrize(
    "text",
    ["", "8000", ":8000", "host:", "host:65536", "host:-1", "host:٣", "::1:80", "[::1]", "[host]:1", "a b:1", "a/b:1"],
)
def test_what_is_neither_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        parse_address(text)


def test_a_taken_port_is_mended_by_a_free_one_on_the_same_host() -> None:
    error = cannot_listen(parse_address("[::1]:80"), OSError(errno.EADDRINUSE, "in use"), flag="--http")
    assert (error.name, error.what, error.fix) == ("PORT_IN_USE", "[::1]:80 is taken", "--http [::1]:0")
    assert error.exit_code == ExitCode.PORT_OR_PEER


def test_an_address_of_another_machine_is_mended_by_loopback() -> None:
    error = cannot_listen(parse_address("1.2.3.4:80"), OSError(errno.EADDRNOTAVAIL, "Not ours"), flag="--http")
    assert (error.name, error.why, error.fix) == ("BAD_ADDRESS", "not ours", "--http 127.0.0.1:0")


def test_a_library_that_does_not_say_why_leaves_both_reasons_open() -> None:
    error = cannot_listen(parse_address("h:1"), OSError("no"), flag="--listen")
    assert error.name == "PORT_IN_USE"
    assert error.why.endswith("or the address is not this machine's")
