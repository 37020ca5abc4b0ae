"""The loopback transport: the shipped fake. Both ends in one process, no threads, faults on demand.

A read happens inside the call that starts it, unless reads are held; then inside `LoopbackFaults.release`. So a test,
or a simulation with a virtual clock, decides when bytes arrive. Tickets, bounds and endings are those of a real
transport.
"""

import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvtransfer.layout import BlockId
from kvtransfer.memory import PoolMemory
from kvtransfer.selftest import run_selftest
from kvtransfer.ticket import TicketBook, TicketVerdict
from kvtransfer.transport import BlockRead, SelfTest, TransportOffer, check_reads
from staffetta.errors import TransportError

_exporters: "dict[str, LoopbackExporter]" = {}  # by endpoint; entries come and go with exporters


@dataclass(slots=True)
class LoopbackFaults:
    """What goes wrong with reads from one exporter. Set fields at any time; reads that have ended are not touched.

    `num_failures`: that many next reads fail halfway, with the first half of the blocks written. `flips`: the next
    reads arrive with these bits flipped, one (index of the block in the read, bit of the page) for each read.
    """

    num_failures: int = 0
    flips: list[tuple[int, int]] = field(default_factory=list)
    is_held: bool = False
    lock: "threading.RLock" = field(
        default_factory=threading.RLock
    )  # one read at a time; its callback may start the next
    _held: "list[tuple[LoopbackReader, _HeldRead]]" = field(default_factory=list)  # under the lock

    def hold(self) -> None:
        """Lets reads wait from now on, as if the peer had stopped."""
        self.is_held = True

    def release(self) -> None:
        """Lets reads go on; those that waited happen now, in order, on this thread."""
        with self.lock:
            self.is_held = False
            held, self._held = self._held, []
            for reader, read in held:
                reader.carry_out(read)

    def keep(self, reader: "LoopbackReader", read: "_HeldRead") -> None:
        """Keeps a read until `release`. For the reader."""
        self._held.append((reader, read))

    def drop(self, reader: "LoopbackReader") -> "list[_HeldRead]":
        """Takes back what is held of one reader. For the reader."""
        dropped = [read for owner, read in self._held if owner is reader]
        self._held = [(owner, read) for owner, read in self._held if owner is not reader]
        return dropped


@dataclass(frozen=True, slots=True)
class _HeldRead:
    future: "Future[int]"
    ticket: bytes
    reads: tuple[BlockRead, ...]


class LoopbackExporter:
    """Lets readers of the same process read a pool."""

    def __init__(self, memory: PoolMemory, *, tickets: TicketBook) -> None:
        self.transport = "loopback"
        self.memory = memory
        self.tickets = tickets
        self.faults = LoopbackFaults()
        self.session_keys: set[bytes] = set()
        self._endpoint = secrets.token_hex(16)
        _exporters[self._endpoint] = self

    def offer(self) -> TransportOffer:
        """As KVExporter says."""
        session_key = secrets.token_bytes(32)
        self.session_keys.add(session_key)
        return TransportOffer(self.transport, self._endpoint, session_key, self.memory.num_blocks)

    def withdraw(self, session_key: bytes) -> None:
        """As KVExporter says: later reads fail."""
        self.session_keys.discard(session_key)

    def close(self) -> None:
        """As KVExporter says."""
        _exporters.pop(self._endpoint, None)
        self.session_keys.clear()


class LoopbackReader:
    """Reads the pool of a LoopbackExporter."""

    def __init__(self, offer: TransportOffer, memory: PoolMemory) -> None:
        exporter = _exporters.get(offer.endpoint)
        if exporter is None or offer.session_key not in exporter.session_keys:
            raise TransportError("no loopback exporter of this process has made that offer")
        if exporter.memory.page_bytes != memory.page_bytes:
            raise TransportError(f"the peer's pages have {exporter.memory.page_bytes} bytes, ours {memory.page_bytes}")
        self.transport = "loopback"
        self._exporter = exporter
        self._memory = memory
        self._session_key = offer.session_key
        self._is_closed = False

    def read(self, ticket: bytes, reads: Sequence[BlockRead]) -> "Future[int]":
        """As KVReader says."""
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        remote_blocks = self._exporter.memory.num_blocks
        try:
            check_reads(reads, num_remote_blocks=remote_blocks, num_local_blocks=self._memory.num_blocks)
        except TransportError as error:
            future.set_exception(error)
            return future
        started = _HeldRead(future, ticket, tuple(reads))
        with self._exporter.faults.lock:
            if self._exporter.faults.is_held and reads and not self._is_closed:
                self._exporter.faults.keep(self, started)
            else:
                self.carry_out(started)
        return future

    def measure(self) -> SelfTest:
        """As KVReader says."""
        return run_selftest(self.transport, self._read_probe, expected=self._memory.probe)

    def close(self) -> None:
        """As KVReader says."""
        with self._exporter.faults.lock:
            self._is_closed = True
            for read in self._exporter.faults.drop(self):
                read.future.set_exception(TransportError("the transport was closed"))

    def carry_out(self, read: _HeldRead) -> None:
        """Copies, with the faults that are due, and resolves the future."""
        with self._exporter.faults.lock:
            try:
                num_bytes = self._copy(read)
            except TransportError as error:
                read.future.set_exception(error)
            else:
                read.future.set_result(num_bytes)

    def _copy(self, read: _HeldRead) -> int:
        if not read.reads:
            return 0
        if self._is_closed:
            raise TransportError("the transport was closed")
        if self._session_key not in self._exporter.session_keys:
            raise TransportError("the connection to the peer broke")
        remote_ids = [block.remote_block_id for block in read.reads]
        verdict = self._exporter.tickets.check(read.ticket, self._session_key, remote_ids)
        if verdict is not TicketVerdict.VALID:
            raise TransportError(f"the peer refused to have blocks read: ticket {verdict.name}")
        faults = self._exporter.faults
        is_failing = faults.num_failures > 0
        for block in read.reads[: len(read.reads) // 2] if is_failing else read.reads:
            source = self._exporter.memory.block(BlockId(block.remote_block_id))
            self._memory.block(BlockId(block.local_block_id))[:] = source
        if is_failing:
            faults.num_failures -= 1
            raise TransportError("the connection to the peer broke")
        if faults.flips:
            index, bit = faults.flips.pop(0)
            self._memory.block(BlockId(read.reads[index].local_block_id))[bit // 8] ^= 1 << bit % 8
        return len(read.reads) * self._memory.page_bytes

    def _read_probe(self, buffer: memoryview) -> None:
        buffer[:] = self._exporter.memory.probe
