"""Tickets: what a peer must show to read blocks. The pool's owner makes them, random, for sessions, blocks and a time.

A ticket names blocks, never memory. Transports that serve bytes check one for every frame; on mapped transports the
authenticated worker of the same host is trusted instead, and checksums tell it when it came too late.
"""

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from staffetta.errors import ExhaustedError

TICKET_BYTES: Final = 16


class TicketVerdict(IntEnum):
    """Whether a ticket opens the blocks asked for. The numbers travel on the wire."""

    VALID = 0
    UNKNOWN = 1
    """Never issued, revoked, or expired and swept."""
    EXPIRED = 2
    OTHER_SESSION = 3
    """Issued to a different peer."""
    OTHER_BLOCKS = 4
    """Does not cover every block asked for."""


@dataclass(slots=True)
class _Ticket:
    request_id: str
    session_keys: frozenset[bytes]
    block_ids: set[int]
    expires_at: float


class TicketBook:
    """All tickets of one worker. Any thread may call anything; `clock` counts seconds and never goes back."""

    def __init__(self, *, max_tickets: int = 4096, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_tickets = max_tickets
        self._clock = clock
        self._lock = threading.Lock()
        self._tickets: dict[bytes, _Ticket] = {}  # under the lock

    def __len__(self) -> int:
        with self._lock:
            return len(self._tickets)

    def issue(
        self, request_id: str, session_keys: Collection[bytes], block_ids: Iterable[int], *, lease_s: float
    ) -> bytes:
        """Makes a ticket for `block_ids`, good for `lease_s` seconds for whoever holds one of `session_keys`.

        `session_keys` are those of every offer made to the peer: which transport it picks is its own choice. Raises
        ExhaustedError when `max_tickets` are out and none of them has expired.
        """
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            if len(self._tickets) >= self._max_tickets:
                self._drop_expired()
            if len(self._tickets) >= self._max_tickets:
                raise ExhaustedError(f"{self._max_tickets} hand-offs are waiting to be read; retry when one has ended")
            expires_at = self._clock() + lease_s
            self._tickets[ticket] = _Ticket(request_id, frozenset(session_keys), set(block_ids), expires_at)
        return ticket

    def extend(self, ticket: bytes, block_ids: Iterable[int], *, lease_s: float) -> None:
        """Adds blocks, maybe none, and lets the lease start anew. Raises KeyError when the ticket is gone."""
        with self._lock:
            record = self._tickets[ticket]
            record.block_ids.update(block_ids)
            record.expires_at = self._clock() + lease_s

    def renew(self, ticket: bytes, *, lease_s: float) -> bool:
        """Lets the lease start anew; False when the ticket is gone, and its blocks can no longer be read."""
        with self._lock:
            record = self._tickets.get(ticket)
            if record is not None:
                record.expires_at = self._clock() + lease_s
            return record is not None

    def check(self, ticket: bytes, session_key: bytes, block_ids: Iterable[int]) -> TicketVerdict:
        """Says whether `ticket`, shown within the session of `session_key`, covers all of `block_ids`."""
        with self._lock:
            record = self._tickets.get(ticket)
            if record is None:
                return TicketVerdict.UNKNOWN
            if session_key not in record.session_keys:
                return TicketVerdict.OTHER_SESSION
            if record.expires_at <= self._clock():
                return TicketVerdict.EXPIRED
            if not record.block_ids.issuperset(block_ids):
                return TicketVerdict.OTHER_BLOCKS
            return TicketVerdict.VALID

    def revoke(self, ticket: bytes) -> None:
        """Ends a ticket; idempotent. Call it before the blocks are freed. A frame already being sent goes on: harmless,
        because the reader's checksums will not match."""
        with self._lock:
            self._tickets.pop(ticket, None)

    def _drop_expired(self) -> None:
        now = self._clock()
        for ticket in [ticket for ticket, record in self._tickets.items() if record.expires_at <= now]:
            del self._tickets[ticket]
