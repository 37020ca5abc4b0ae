"""A listening socket, a thread that accepts, a thread for each connection, and a sure end to all of them."""

import logging
import socket
import threading
from collections.abc import Callable
from typing import Final

from kvtransfer.connection import shut
from kvtransfer.frames import FrameError

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256
ACCEPT_RETRY_S: Final = 0.1


class Listener:
    """Serves connections until closed. `serve` handles one connection in a thread of its own and blocks as it likes.

    However `serve` ends, the connection is closed and no other connection is touched. Connections beyond
    MAX_CONNECTIONS are closed unserved.
    """

    def __init__(self, listening: socket.socket, serve: Callable[[socket.socket], None], *, name: str) -> None:
        self._listening = listening
        self._serve = serve
        self._name = name
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._threads: dict[socket.socket, threading.Thread] = {}  # one for each open connection, under the lock
        self._accepting = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Stops accepting, cuts every connection and waits for their threads; idempotent."""
        self._is_closing.set()
        shut(self._listening)  # a blocked accept returns
        self._accepting.join()
        self._listening.close()
        with self._lock:
            threads = list(self._threads.values())
            for connection in self._threads:
                shut(connection)
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                # Closing; or descriptors ran out, and others may free some meanwhile.
                if not self._is_closing.wait(ACCEPT_RETRY_S):
                    log.warning("%s: cannot accept: %s", self._name, error)
                continue
            thread = threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True)
            with self._lock:
                if is_admitted := len(self._threads) < MAX_CONNECTIONS:
                    self._threads[connection] = thread
            if is_admitted:
                thread.start()
            else:
                connection.close()

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except (EOFError, OSError, FrameError) as error:
            log.debug("%s: connection ended: %s", self._name, error)
        except Exception:
            log.exception("%s: connection failed", self._name)
        finally:
            with self._lock:
                del self._threads[connection]
            connection.close()
