"""The peer sessions of an exporter: which keys open it, which connections each holds; and what a reader checks."""

import hmac
import secrets
import socket
import threading
from typing import Final

from kvtransfer.connection import shut
from kvtransfer.frames import SESSION_KEY_BYTES, PoolShape, WelcomeStatus, parse_welcome
from kvtransfer.memory import PROBE_BYTES, PoolMemory
from kvtransfer.transport import TransportOffer
from staffetta.errors import TransportError

MAX_SESSION_CONNECTIONS: Final = 4


class Sessions:
    """Keys and connections. Thread-safe. Keys are compared in constant time, each with each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: dict[bytes, set[socket.socket]] = {}  # by session key, under the lock

    def begin(self) -> bytes:
        """Makes a session and returns its key."""
        session_key = secrets.token_bytes(SESSION_KEY_BYTES)
        with self._lock:
            self._connections[session_key] = set()
        return session_key

    def join(self, shown_key: bytes, connection: socket.socket) -> WelcomeStatus:
        """Takes a connection into the session of `shown_key`, or says why not."""
        with self._lock:
            found = [key for key in self._connections if hmac.compare_digest(key, shown_key)]
            if not found:
                return WelcomeStatus.UNKNOWN_SESSION
            connections = self._connections[found[0]]
            if len(connections) >= MAX_SESSION_CONNECTIONS:
                return WelcomeStatus.TOO_MANY_CONNECTIONS
            connections.add(connection)
            return WelcomeStatus.ACCEPTED

    def leave(self, session_key: bytes, connection: socket.socket) -> None:
        """Forgets a connection; idempotent. Call it before the connection is closed."""
        with self._lock:
            self._connections.get(session_key, set()).discard(connection)

    def end(self, session_key: bytes) -> None:
        """Ends a session and cuts its connections; idempotent."""
        with self._lock:
            for connection in self._connections.pop(session_key, set()):
                shut(connection)


def check_welcome(welcome: bytes, offer: TransportOffer, memory: PoolMemory) -> PoolShape:
    """Returns the sizes of the peer's memory. Raises TransportError when it refuses or they are not as expected."""
    status, shape = parse_welcome(welcome)
    if status is not WelcomeStatus.ACCEPTED:
        raise TransportError(f"the peer refused the {offer.transport} transport: {status.name}")
    expected = PoolShape(offer.num_blocks, memory.page_bytes, PROBE_BYTES)
    if shape != expected:
        raise TransportError(f"the peer's memory is {shape}, expected {expected}")
    return shape
