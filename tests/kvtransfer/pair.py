"""Two pools of one process, connected by a transport: what most tests of this folder begin with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtransfer.memory import PoolMemory
from kvtransfer.ticket import TicketBook
from kvtransfer.transport import KVExporter, KVReader, TransportOffer, export, open_reader
from tests.kvtransfer.peer import random_pages

PAGE_BYTES = 3000  # not a multiple of anything
NUM_REMOTE_BLOCKS = 900  # more than one frame carries
NUM_LOCAL_BLOCKS = 800


@dataclass(frozen=True, slots=True)
class Pair:
    """`remote` holds random pages, `local` zeros; `ticket` opens every remote block."""

    remote: PoolMemory
    local: PoolMemory
    tickets: TicketBook
    exporter: KVExporter
    offer: TransportOffer
    ticket: bytes
    reader: KVReader

    @property
    def remote_pages(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        return as_pages(self.remote)

    @property
    def local_pages(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        return as_pages(self.local)


def as_pages(memory: PoolMemory) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """A view of a pool: uint8[num_blocks, page_bytes]."""
    return np.frombuffer(memory.buffer, dtype=np.uint8).reshape(memory.num_blocks, memory.page_bytes)


def make_exporter(transport: str, memory: PoolMemory, tickets: TicketBook, directory: Path) -> KVExporter:
    return export(transport, memory, tickets=tickets, shm_dir=directory, listen="127.0.0.1:0", advertise="")


@contextmanager
def make_pair(transport: str, directory: Path) -> Iterator[Pair]:
    remote, local = PoolMemory(NUM_REMOTE_BLOCKS, PAGE_BYTES), PoolMemory(NUM_LOCAL_BLOCKS, PAGE_BYTES)
    as_pages(remote)[:] = random_pages(NUM_REMOTE_BLOCKS, PAGE_BYTES)
    tickets = TicketBook()
    exporter = make_exporter(transport, remote, tickets, directory)
    offer = exporter.offer()
    ticket = tickets.issue("request", {offer.session_key}, range(NUM_REMOTE_BLOCKS), lease_s=600)
    reader = open_reader(offer, memory=local)
    try:
        yield Pair(remote, local, tickets, exporter, offer, ticket, reader)
    finally:
        reader.close()
        exporter.close()
        remote.close()
        local.close()
