"""The seam of KV transfer: what a transport is to sender and receiver. Values, protocols, two factories.

KV moves because the receiver reads. No transport writes into anybody else's memory, and none decides whether the
bytes are right: that is `kvtransfer.manifest.verify`, after the read. Life of a transport between two workers:

1. The sender `export`s its pool once, and `offer`s it to each peer that opens a session.
2. The receiver `open_reader`s every offer it can use, `measure`s each and `choose`s the fastest.
3. For each announced chunk of blocks it `read`s them into blocks it has leased.
4. When the session ends, the sender `withdraw`s the offer and the receiver `close`s the reader.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvtransfer.memory import PoolMemory
from kvtransfer.ticket import TicketBook
from staffetta.errors import TransportError


@dataclass(frozen=True, slots=True)
class TransportOffer:
    """How one peer session reaches a pool by one transport. `session_key` is a secret of that session."""

    transport: str
    endpoint: str
    session_key: bytes
    num_blocks: int


@dataclass(frozen=True, slots=True)
class BlockRead:
    """One block to copy from the peer's pool into our own."""

    remote_block_id: int
    local_block_id: int


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What a transport measured between two workers: `num_bytes` of known content, read several times, all correct.

    `bytes_per_s` is the median rate.
    """

    transport: str
    bytes_per_s: float
    num_bytes: int


class KVExporter(Protocol):
    """Lets peers read a pool by one transport. One per worker and transport; it serves many sessions. Thread-safe."""

    transport: str

    def offer(self) -> TransportOffer:
        """Makes a session key and the offer that carries it."""

    def withdraw(self, session_key: bytes) -> None:
        """Ends what `offer` began: the key opens nothing more and the peer's connections are closed; idempotent."""

    def close(self) -> None:
        """Withdraws every offer and stops listening; idempotent. Then no thread of the exporter touches the pool."""


class KVReader(Protocol):
    """Reads one peer's pool into our own. One per peer session. Thread-safe."""

    transport: str

    def read(self, ticket: bytes, reads: Sequence[BlockRead]) -> "Future[int]":
        """Starts copying and returns at once. The result is the number of bytes copied; no blocks is 0, at once.

        The future resolves when nothing touches the local blocks any more, with a result or with a TransportError, and
        cannot be cancelled: until then the blocks belong to the read. It resolves on a thread of the transport. A
        peer that stops answering resolves nothing: whoever waits keeps a deadline and calls `close`. Raises
        ValueError when a local block is named twice or is not in the pool.
        """

    def measure(self) -> SelfTest:
        """Reads the peer's probe several times, verifies it each time, and reports the rate. Blocks for milliseconds.

        Raises TransportError when the content is wrong or the peer does not answer within seconds.
        """

    def close(self) -> None:
        """Cuts the connections; idempotent. When it returns, every future has resolved.

        Called from a future's callback it cuts and returns without waiting for the thread it runs on.
        """


def export(
    transport: str,
    memory: PoolMemory,
    *,
    tickets: TicketBook,
    shm_dir: Path,
    listen: str,
    advertise: str,
) -> KVExporter:
    """Offers `memory` by the transport of that name. The exporter borrows the memory: close the exporter first.

    `shm_dir` is an existing directory, private to this user, for the socket of `shm`. `listen` and `advertise` are the
    host:port of `tcp`; port 0 takes a free one, an empty `advertise` is the listening address. Raises ValueError when a
    setting cannot work, or the name is no transport; OSError when the address is taken.
    """
    # Imported when asked for: a transport may need libraries and devices that a worker without it lacks.
    if transport == "shm":
        from kvtransfer.shm import ShmExporter

        return ShmExporter(memory, directory=shm_dir)
    if transport == "tcp":
        from kvtransfer.tcp import TcpExporter

        return TcpExporter(memory, tickets=tickets, listen=listen, advertise=advertise)
    if transport == "loopback":
        from kvtransfer.loopback import LoopbackExporter

        return LoopbackExporter(memory, tickets=tickets)
    raise ValueError(f"{transport!r} is not a transport; there are shm, tcp and loopback")


def open_reader(offer: TransportOffer, *, memory: PoolMemory) -> KVReader:
    """Connects to a peer's pool, to read it into `memory`. Blocks for milliseconds, for seconds at most.

    Raises TransportError when the peer cannot be reached or refuses, its pool is not what the offer says, or the
    transport does not exist here. The reader borrows the memory: close the reader first.
    """
    if offer.transport == "shm":
        from kvtransfer.shm import ShmReader

        return ShmReader(offer, memory)
    if offer.transport == "tcp":
        from kvtransfer.tcp import TcpReader

        return TcpReader(offer, memory)
    if offer.transport == "loopback":
        from kvtransfer.loopback import LoopbackReader

        return LoopbackReader(offer, memory)
    raise TransportError(f"the peer offers transport {offer.transport[:32]!r}, which this worker does not have")


def choose(measurements: Sequence[SelfTest]) -> SelfTest:
    """The fastest of `measurements`; of equals, the first. Raises ValueError when there is none."""
    if not measurements:
        raise ValueError("no transport was measured; there is nothing to choose from")
    return max(measurements, key=lambda measurement: measurement.bytes_per_s)


def merge_runs(reads: Sequence[BlockRead]) -> list[tuple[int, int, int]]:
    """Joins reads adjacent in both pools: [(first remote block, first local block, number of blocks)]."""
    runs: list[tuple[int, int, int]] = []
    for read in reads:
        if runs:
            remote, local, count = runs[-1]
            if (read.remote_block_id, read.local_block_id) == (remote + count, local + count):
                runs[-1] = (remote, local, count + 1)
                continue
        runs.append((read.remote_block_id, read.local_block_id, 1))
    return runs


def check_reads(reads: Sequence[BlockRead], *, num_remote_blocks: int, num_local_blocks: int) -> None:
    """Checks ids before anything moves: local ones are ours (ValueError), remote ones the peer's (TransportError)."""
    local_ids = {read.local_block_id for read in reads}
    if len(local_ids) != len(reads):
        raise ValueError("a local block is named twice in one read")
    if local_ids and not 0 <= min(local_ids) <= max(local_ids) < num_local_blocks:
        raise ValueError(f"blocks {min(local_ids)} to {max(local_ids)} are not all in our pool of {num_local_blocks}")
    for read in reads:
        if not 0 <= read.remote_block_id < num_remote_blocks:
            raise TransportError(
                f"block {read.remote_block_id} is not in the peer's pool of {num_remote_blocks} blocks"
            )
