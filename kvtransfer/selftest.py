"""Measures a transport between two workers by reading the peer's probe: content first, then the rate."""

import statistics
import time
from collections.abc import Callable
from typing import Final

from kvtransfer.memory import PROBE_BYTES
from kvtransfer.transport import SelfTest
from staffetta.errors import TransportError

NUM_ROUNDS: Final = 5


def run_selftest(transport: str, read_probe: Callable[[memoryview], None], *, expected: memoryview) -> SelfTest:
    """Calls `read_probe` with a buffer of PROBE_BYTES to fill: once to warm up, then NUM_ROUNDS times on the clock.

    `expected` is the probe of our own pool; every pool has the same. Raises TransportError when what was read differs.
    """
    received = bytearray(PROBE_BYTES)
    durations_s: list[float] = []
    for _ in range(1 + NUM_ROUNDS):
        received[:] = bytes(PROBE_BYTES)  # so that a read which brings nothing cannot pass
        start = time.perf_counter()
        read_probe(memoryview(received))
        durations_s.append(time.perf_counter() - start)
        if received != expected:
            raise TransportError(f"transport {transport} changed bytes of the self-test on their way")
    bytes_per_s = PROBE_BYTES / statistics.median(durations_s[1:])
    return SelfTest(transport, bytes_per_s, PROBE_BYTES * NUM_ROUNDS)
