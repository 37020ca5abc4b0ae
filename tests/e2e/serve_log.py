"""What a running `serve` writes to standard error, line by line, for tests that wait on what it says."""

import re
import threading
import time
from collections import Counter
from typing import IO, Final

_END = re.compile(r"(?P<name>[a-z]+-\d+|gateway|zygote) \(pid \d+\) ended by (?P<how>[^;]+);")
_LAST_LINES: Final = 30


class ServeLog:
    """Reads a pipe to its end in a thread of its own. Any thread may ask."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="serve-log", daemon=True)
        self._reader.start()

    def lines(self) -> list[str]:
        """Every line so far."""
        with self._changed:
            return list(self._lines)

    def tail(self) -> str:
        """The last lines, for messages of failing tests."""
        return "\n".join(self.lines()[-_LAST_LINES:])

    def wait_for(self, text: str, *, timeout_s: float, num_times: int = 1) -> None:
        """Returns once `num_times` lines contain `text`; AssertionError with the last lines when that never is."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while sum(text in line for line in self._lines) < num_times:
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise AssertionError(f"no line says {text!r}; the last ones:\n" + "\n".join(self._lines[-30:]))

    def ends(self, how: str) -> Counter[str]:
        """How often each child ended by `how`, say SIGKILL, and was started again."""
        found = (_END.search(line) for line in self.lines())
        return Counter(end["name"] for end in found if end is not None and end["how"] == how)

    def close(self) -> None:
        """Waits for the pipe's end, which the process's end brings."""
        self._reader.join(timeout=10)
        self._pipe.close()

    def _read(self) -> None:
        for line in self._pipe:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
