"""A server under load, whatever door it has: the seam that the load generator drives, and how a command line names one.

`NAME=http://HOST:PORT` is any server with OpenAI's completions, `NAME=grpc://HOST:PORT` our InferenceService. Without
a name the address is the name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast
from urllib.parse import urlsplit

from bench.record import Record
from staffetta.exits import UsageError


class TargetError(RuntimeError):
    """A server refused a request, broke off or sent something else than was asked for: no figure can come of it."""


class Answer(Protocol):
    """One answer as it came, not yet looked into: reading it waits until nothing is being timed."""

    def record(self) -> Record:
        """What the client saw. Raises TargetError when the answer is not what was asked for."""


class Target(Protocol):
    """One server. Event loop only; any number of requests at a time."""

    @property
    def name(self) -> str:
        """What tables call it."""

    async def open(self) -> None:
        """Finds out what there is to know before anything is timed; may be asked again, to see whether the server still
        answers. Raises TargetError when it does not within seconds."""

    async def complete(self, prompt: Sequence[int], output_tokens: int, *, due_s: float) -> Answer:
        """Streams one greedy completion of exactly `output_tokens` tokens to its end. Raises TargetError."""

    async def close(self) -> None:
        """Closes all connections."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server as the command line names it."""

    name: str
    door: Literal["http", "grpc"]
    host: str
    port: int


def parse_target(text: str) -> Address:
    """Reads `[NAME=]http://HOST:PORT` or `[NAME=]grpc://HOST:PORT`. Raises UsageError."""
    name, _, url = text.rpartition("=")
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "grpc") or parts.hostname is None or port is None:
        raise UsageError(
            "BAD_TARGET",
            f"{text!r} names no server",
            why="a server is [NAME=]http://HOST:PORT or [NAME=]grpc://HOST:PORT",
            fix="python -m bench.serve ours=http://127.0.0.1:8000",
        )
    door = cast('Literal["http", "grpc"]', parts.scheme)
    return Address(name or f"{door}://{parts.hostname}:{port}", door, parts.hostname, port)


def make_target(address: Address) -> Target:
    """The client for a door. Must be called on the event loop that will use it."""
    if address.door == "http":
        from bench.http_target import HttpTarget

        return HttpTarget(address.name, address.host, address.port)
    from bench.grpc_target import GrpcTarget

    return GrpcTarget(address.name, f"{address.host}:{address.port}")
