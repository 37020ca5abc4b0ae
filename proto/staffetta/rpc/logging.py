"""Log lines: one format for every process, on standard error, the process's name on each line."""

import logging
import sys


def configure(process: str, level: str) -> None:
    """Sets up the root logger. `process` is the worker's id or "gateway"; `level` as in the schema."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {process} %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
