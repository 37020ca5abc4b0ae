"""What supervisor and zygote tell one another: one JSON object per packet, its type beside its fields."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

MAX_MESSAGE_BYTES: Final = 128 * 1024


@dataclass(frozen=True, slots=True)
class Fork:
    """To the zygote, with the descriptor that becomes the worker's stdout and stderr: start a worker."""

    name: str
    role: str
    entry: str
    """module:function, called with the role's configuration; its result is the exit code."""
    config: str
    """The resolved configuration, as `staffetta.config.resolved` writes it."""


@dataclass(frozen=True, slots=True)
class Signal:
    """To the zygote: send a worker a signal. Nothing happens when it has ended."""

    pid: int
    number: int


@dataclass(frozen=True, slots=True)
class Imported:
    """From the zygote, once: it takes commands."""


@dataclass(frozen=True, slots=True)
class Forked:
    """From the zygote: the worker runs."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """From the zygote: the worker was not started."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Ended:
    """From the zygote: the worker ended and was reaped. `status` is its exit code, or minus the signal's number."""

    name: str
    pid: int
    status: int


Command = Fork | Signal
Reply = Imported | Forked | Refused | Ended

_COMMANDS: Final[dict[str, type[Command]]] = {"Fork": Fork, "Signal": Signal}
_REPLIES: Final[dict[str, type[Reply]]] = {
    "Imported": Imported,
    "Forked": Forked,
    "Refused": Refused,
    "Ended": Ended,
}


def encode(message: Command | Reply) -> bytes:
    """One packet."""
    return json.dumps([type(message).__name__, asdict(message)]).encode()


def decode_command(packet: bytes) -> Command:
    """The command in a packet."""
    name, fields = _parts(packet)
    return _COMMANDS[name](**fields)


def decode_reply(packet: bytes) -> Reply:
    """The reply in a packet."""
    name, fields = _parts(packet)
    return _REPLIES[name](**fields)


def _parts(packet: bytes) -> tuple[str, dict[str, Any]]:
    name, fields = json.loads(packet)
    return name, fields
