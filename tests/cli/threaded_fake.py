"""A worker whose import starts a thread, which makes every fork unsafe."""

import threading

from tests.cli.fakes import worker_main

__all__ = ["worker_main"]

_idle = threading.Event()
threading.Thread(target=_idle.wait, daemon=True).start()
