"""Every byte of our own framing, as pure functions. Nothing here touches a socket, and nothing is believed.

Integers are little-endian. Lengths are never taken from the peer: each message has a fixed size, or one that follows
from a bounded count; the number of payload bytes is computed by both sides and compared. What does not parse raises
FrameError, which ends that connection and nothing else.

    hello, reader → sender, once, 40 bytes
    0        4     5       8                40
    | "STKV" | ver | zeros | session key    |

    welcome, sender → reader, once, 32 bytes
    0        4     5        6   8            16           24            32
    | "STKV" | ver | status | 0 | num_blocks | page_bytes | probe_bytes |

    request, reader → sender, 24 bytes + 8 for each run
    0        4      5   6          8            24
    | "STRQ" | kind | 0 | num_runs | ticket     | first: u32, num_units: u32 | first: u32, num_units: u32 | …

    reply, sender → reader, 16 bytes, then num_bytes bytes of the runs, in order
    0        4        5       8           16
    | "STRP" | status | zeros | num_bytes | bytes …

A run counts units of a region: blocks of the pool, or units of the probe. A reply that is not VALID has no bytes. Zeros
are reserved and not looked at.
"""

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeVar

from kvtransfer.ticket import TICKET_BYTES, TicketVerdict

PROTOCOL_VERSION: Final = 1
SESSION_KEY_BYTES: Final = 32
MAX_FRAME_UNITS: Final = 512

_HELLO: Final = struct.Struct(f"<4sB3x{SESSION_KEY_BYTES}s")
_WELCOME: Final = struct.Struct("<4sBB2xQQQ")
_REQUEST: Final = struct.Struct(f"<4sBxH{TICKET_BYTES}s")
_RUN: Final = struct.Struct("<II")
_REPLY: Final = struct.Struct("<4sB3xQ")

HELLO_BYTES: Final = _HELLO.size
WELCOME_BYTES: Final = _WELCOME.size
REQUEST_HEAD_BYTES: Final = _REQUEST.size
RUN_BYTES: Final = _RUN.size
REPLY_HEAD_BYTES: Final = _REPLY.size

_Member = TypeVar("_Member", bound=IntEnum)


class FrameError(ValueError):
    """Bytes from a peer that are not what they must be. The connection that carried them is of no further use."""


class WelcomeStatus(IntEnum):
    """How a sender answers a hello."""

    ACCEPTED = 0
    UNKNOWN_SESSION = 1
    TOO_MANY_CONNECTIONS = 2


class Region(IntEnum):
    """What a request reads."""

    BLOCKS = 1
    PROBE = 2


class PoolShape(NamedTuple):
    """The sizes of a sender's memory, which a reader compares with what it knows."""

    num_blocks: int
    page_bytes: int
    probe_bytes: int


class Run(NamedTuple):
    """`num_units` adjacent units of a region, from `first` on."""

    first: int
    num_units: int


class RequestHead(NamedTuple):
    """The fixed part of a request; `num_runs` runs follow."""

    region: Region
    num_runs: int
    ticket: bytes


def encode_hello(session_key: bytes) -> bytes:
    """Packs what a reader says first."""
    return _HELLO.pack(b"STKV", PROTOCOL_VERSION, session_key)


def parse_hello(data: bytes) -> bytes:
    """Returns the session key shown."""
    magic, version, session_key = _unpack(_HELLO, data)
    _expect("hello", (b"STKV", PROTOCOL_VERSION), (magic, version))
    return bytes(session_key)


def encode_welcome(status: WelcomeStatus, shape: PoolShape) -> bytes:
    """Packs the sender's answer to a hello."""
    return _WELCOME.pack(b"STKV", PROTOCOL_VERSION, status, *shape)


def parse_welcome(data: bytes) -> tuple[WelcomeStatus, PoolShape]:
    """Returns the sender's answer and the sizes it claims."""
    magic, version, status, *sizes = _unpack(_WELCOME, data)
    _expect("welcome", (b"STKV", PROTOCOL_VERSION), (magic, version))
    return _member(WelcomeStatus, status), PoolShape(*sizes)


def encode_request(region: Region, ticket: bytes, runs: Sequence[Run]) -> bytes:
    """Packs a request."""
    return _REQUEST.pack(b"STRQ", region, len(runs), ticket) + b"".join(_RUN.pack(*run) for run in runs)


def parse_request_head(data: bytes) -> RequestHead:
    """Returns the fixed part of a request, `num_runs` between 1 and MAX_FRAME_UNITS."""
    magic, region, num_runs, ticket = _unpack(_REQUEST, data)
    _expect("request", b"STRQ", magic)
    if not 1 <= num_runs <= MAX_FRAME_UNITS:
        raise FrameError(f"request has {num_runs} runs, may have 1 to {MAX_FRAME_UNITS}")
    return RequestHead(_member(Region, region), num_runs, ticket)


def parse_runs(data: bytes, *, num_runs: int, num_units: int) -> tuple[Run, ...]:
    """Returns the runs of a request: none empty, all inside a region of `num_units`, MAX_FRAME_UNITS units at most."""
    if len(data) != num_runs * RUN_BYTES:
        raise FrameError(f"{num_runs} runs need {num_runs * RUN_BYTES} bytes, got {len(data)}")
    runs = tuple(Run(*fields) for fields in _RUN.iter_unpack(data))
    for run in runs:
        if run.num_units < 1 or run.first + run.num_units > num_units:
            raise FrameError(f"run of {run.num_units} units from {run.first} is not in a region of {num_units} units")
    if (total := sum(run.num_units for run in runs)) > MAX_FRAME_UNITS:
        raise FrameError(f"request names {total} units, may name {MAX_FRAME_UNITS}")
    return runs


def encode_reply(verdict: TicketVerdict, num_bytes: int) -> bytes:
    """Packs the head of a reply."""
    return _REPLY.pack(b"STRP", verdict, num_bytes)


def parse_reply(data: bytes, *, expected_bytes: int) -> TicketVerdict:
    """Returns the verdict; VALID means that exactly `expected_bytes` bytes follow, anything else that none do."""
    magic, status, num_bytes = _unpack(_REPLY, data)
    _expect("reply", b"STRP", magic)
    verdict = _member(TicketVerdict, status)
    _expect("bytes of reply", expected_bytes if verdict is TicketVerdict.VALID else 0, num_bytes)
    return verdict


def to_runs(unit_ids: Iterable[int]) -> list[Run]:
    """Joins adjacent units, keeping their order."""
    runs: list[Run] = []
    for unit_id in unit_ids:
        if runs and unit_id == runs[-1].first + runs[-1].num_units:
            runs[-1] = Run(runs[-1].first, runs[-1].num_units + 1)
        else:
            runs.append(Run(unit_id, 1))
    return runs


def to_views(memory: memoryview, runs: Iterable[Run], *, unit_bytes: int) -> list[memoryview]:
    """The bytes of each run in a region that begins at the start of `memory`, without a copy."""
    return [memory[run.first * unit_bytes : (run.first + run.num_units) * unit_bytes] for run in runs]


def _unpack(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    try:
        return layout.unpack(data)
    except struct.error:
        raise FrameError(f"expected {layout.size} bytes, got {len(data)}") from None


def _expect(what: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise FrameError(f"{what}: expected {expected!r}, got {actual!r}")


def _member(kind: type[_Member], number: int) -> _Member:
    try:
        return kind(number)
    except ValueError:
        raise FrameError(f"{number} is no {kind.__name__}") from None
