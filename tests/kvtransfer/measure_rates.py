"""Read rates between two processes, next to memcpy in the same run: `python -m tests.kvtransfer.measure_rates`.

Rounds alternate between memcpy and the transports, so that a disturbed machine disturbs all alike; medians are printed.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvtransfer.checksum import span_checksum
from kvtransfer.layout import BlockId
from kvtransfer.memory import PoolMemory
from kvtransfer.transport import BlockRead, KVReader, open_reader
from tests.kvtransfer.peer import Peer

PAGE_BYTES = 48 * 1024


def time_once(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def read_all(reader: KVReader, ticket: bytes, reads: list[BlockRead]) -> None:
    reader.read(ticket, reads).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    num_blocks = arguments.mib * 2**20 // PAGE_BYTES
    num_bytes = num_blocks * PAGE_BYTES
    memory = PoolMemory(num_blocks, PAGE_BYTES)
    local = np.frombuffer(memory.buffer, dtype=np.uint8)
    adjacent = [BlockRead(block, block) for block in range(num_blocks)]
    order = np.random.default_rng(3).permutation(num_blocks)
    scattered = [BlockRead(int(block), index) for index, block in enumerate(order)]

    def checksum_all() -> None:
        for block in range(num_blocks):
            span_checksum(memory.block(BlockId(block)))

    with (
        tempfile.TemporaryDirectory() as directory,
        Peer(Path(directory), num_blocks=num_blocks, page_bytes=PAGE_BYTES) as peer,
    ):
        source = peer.pages.reshape(-1)
        readers = [open_reader(offer, memory=memory) for offer in peer.offers.values()]
        actions: dict[str, Callable[[], object]] = {
            "memcpy": lambda: np.copyto(local, source),
            "checksum": checksum_all,
        }
        for reader in readers:
            actions[f"{reader.transport} adjacent"] = functools.partial(read_all, reader, peer.ticket, adjacent)
            actions[f"{reader.transport} scattered"] = functools.partial(read_all, reader, peer.ticket, scattered)
        durations_s: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(arguments.rounds):
            for name, action in actions.items():
                durations_s[name].append(time_once(action))
        medians_s = {name: statistics.median(times) for name, times in durations_s.items()}
        for name, median_s in medians_s.items():
            ratio = medians_s["memcpy"] / median_s
            print(f"{name:14} {num_bytes / median_s / 1e9:6.2f} GB/s   {ratio:4.2f} of memcpy")
        for reader in readers:
            print(f"self-test      {reader.measure().bytes_per_s / 1e9:6.2f} GB/s   {reader.transport}")
            reader.close()
    memory.close()


if __name__ == "__main__":
    main()
