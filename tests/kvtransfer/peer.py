"""A worker's pool in another process: `Peer` starts one and talks to it, `main` is what runs there."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import numpy as np

from kvtransfer.memory import PoolMemory
from kvtransfer.ticket import TicketBook
from kvtransfer.transport import TransportOffer, export
from staffetta.failpoint import arm

LEASE_S = 600.0


class Peer:
    """Exports a pool of random pages over shm and tcp from a child process, with one ticket for all blocks."""

    def __init__(self, directory: Path, *, num_blocks: int, page_bytes: int, failpoint: str = "") -> None:
        self.num_blocks = num_blocks
        self.page_bytes = page_bytes
        command = [sys.executable, "-m", "tests.kvtransfer.peer", str(directory), str(num_blocks), str(page_bytes)]
        self._process = subprocess.Popen([*command, failpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        said = json.loads(self._read_line())
        self.ticket = base64.b64decode(said["ticket"])
        self.offers = {
            transport: TransportOffer(transport, endpoint, base64.b64decode(key), num_blocks)
            for transport, (endpoint, key) in said["offers"].items()
        }

    @property
    def pages(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """What the peer's pool holds."""
        return random_pages(self.num_blocks, self.page_bytes)

    def stop(self) -> None:
        """Stops the process as SIGSTOP does, and returns when it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def kill(self) -> None:
        """Ends the process as SIGKILL does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def random_pages(num_blocks: int, page_bytes: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """The same random pages in every process: uint8[num_blocks, page_bytes]."""
    return np.random.default_rng(7).integers(0, 256, size=(num_blocks, page_bytes), dtype=np.uint8)


def main() -> None:
    directory, num_blocks, page_bytes, failpoint = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    arm((failpoint,) if failpoint else ())
    memory = PoolMemory(num_blocks, page_bytes)
    np.frombuffer(memory.buffer, dtype=np.uint8)[:] = random_pages(num_blocks, page_bytes).reshape(-1)
    tickets = TicketBook()
    exporters = [
        export(name, memory, tickets=tickets, shm_dir=directory, listen="127.0.0.1:0", advertise="")
        for name in ("shm", "tcp")
    ]
    offers = [exporter.offer() for exporter in exporters]
    ticket = tickets.issue("request", {offer.session_key for offer in offers}, range(num_blocks), lease_s=LEASE_S)
    said = {offer.transport: (offer.endpoint, base64.b64encode(offer.session_key).decode()) for offer in offers}
    print(json.dumps({"ticket": base64.b64encode(ticket).decode(), "offers": said}), flush=True)
    sys.stdin.read()  # until the parent closes it, or ends
    for exporter in exporters:
        exporter.close()


if __name__ == "__main__":
    main()
