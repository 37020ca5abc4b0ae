"""Reads announced chunks into leased blocks, and verifies every block before it counts.

One `ChunkReader` serves one attempt, on the event loop; bytes move in the transport's thread and are verified in a
worker thread. It never counts a block whose bytes are not what this side expects at its place, and never forgets a read
that may still touch its blocks.
"""

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.layout import BlockId, KVGroup
from kvtransfer.manifest import BlockEntry, VerifiedBlock, verify
from kvtransfer.memory import PoolMemory
from kvtransfer.transport import BlockRead
from staffetta import failpoint
from staffetta.errors import HandoffFailedError, ProtocolError
from staffetta.hashing import BlockHash
from staffetta.v1 import prefill_pb2
from worker.codec import entry_from_proto

PROGRESS_CHECK_S = 0.25


class Peer(Protocol):
    """The prefill worker of an attempt, as the attempt sees it."""

    worker_id: str

    @property
    def transport(self) -> str:
        """The transport in use."""

    def last_progress(self) -> float:
        """Monotonic time at which the peer last showed that its engine advances."""

    def read(self, ticket: bytes, reads: list[BlockRead]) -> "Future[int]":
        """Starts reading blocks; resolves when nothing touches the local ones any more."""

    def last_read(self) -> float:
        """Monotonic time at which a read of the peer's session last ended."""

    def cut(self) -> None:
        """Ends the transport's endpoint, and with it every read under way."""

    def release(self, handoff_id: str) -> None:
        """Tells the peer that its blocks are no longer needed; idempotent."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The blocks of this side that the engine leased to an attempt, and the hashes that it expects at their places."""

    block_ids: tuple[BlockId, ...]
    first_block_index: int
    chain_hashes: tuple[BlockHash, ...]


class ChunkReader:
    """The reads of one attempt, and what they brought. Event loop only, except `_verify`."""

    def __init__(
        self, peer: Peer, memory: PoolMemory, group: KVGroup, *, num_prompt_tokens: int, timeout_s: float
    ) -> None:
        """`timeout_s` bounds how long the peer's whole session may go without a read that ends."""
        self._peer = peer
        self._memory = memory
        self._group = group
        self._num_prompt_tokens = num_prompt_tokens
        self._timeout_s = timeout_s
        self._reads: set[Future[int]] = set()
        self.num_bytes = 0
        self.num_blocks = 0

    async def pull(self, chunk: prefill_pb2.ChunkReady, grant: Grant, num_landed: int) -> int:
        """Reads and verifies one chunk; returns the new contiguous frontier, in tokens."""
        entries = [entry_from_proto(entry) for entry in chunk.blocks]
        first = num_landed // self._group.block_size
        first_local = first - grant.first_block_index
        if not 0 <= first_local <= len(grant.block_ids) - len(entries):
            raise ProtocolError(f"a chunk of {len(entries)} blocks at index {first} does not fit the granted blocks")
        local_ids = grant.block_ids[first_local : first_local + len(entries)]
        read = self._peer.read(
            chunk.ticket,
            [BlockRead(entry.block_id, local_id) for entry, local_id in zip(entries, local_ids, strict=True)],
        )
        self._reads.add(read)
        await self._wait_for_read(read)
        num_bytes = read.result()
        self._reads.discard(read)
        verified = await asyncio.to_thread(self._verify, entries, local_ids, first, grant)
        self._spoil_if_asked(verified)
        self.num_bytes += num_bytes
        self.num_blocks += len(verified)
        return num_landed + sum(block.entry.num_tokens for block in verified)

    def outstanding(self) -> "set[Future[int]]":
        """The reads that may still touch their blocks."""
        return {read for read in self._reads if not read.done()}

    async def quiesce(self, outstanding: "set[Future[int]]") -> None:
        """Waits for these reads, at least one; past the deadline the endpoint is torn down, which ends them."""
        waiting = {_settled(read) for read in outstanding}
        _, late = await asyncio.wait(waiting, timeout=self._timeout_s)
        if late:
            self._peer.cut()
            await asyncio.wait(late)

    async def _wait_for_read(self, read: "Future[int]") -> None:
        """Waits for a read. Raises HandoffFailedError when for `timeout_s` no read of the whole session has ended."""
        started = time.monotonic()
        settled = _settled(read)
        while not (await asyncio.wait({settled}, timeout=PROGRESS_CHECK_S))[0]:
            quiet_s = time.monotonic() - max(started, self._peer.last_read())
            if quiet_s > self._timeout_s:
                raise HandoffFailedError(f"no read from {self._peer.worker_id} has ended for {quiet_s:.1f} s")

    def _verify(
        self, entries: list[BlockEntry], local_ids: tuple[BlockId, ...], first: int, grant: Grant
    ) -> list[VerifiedBlock]:
        """Checks every block against what this side expects at its place. Worker thread; the blocks are leased."""
        block_size = self._group.block_size
        verified: list[VerifiedBlock] = []
        for offset, (entry, local_id) in enumerate(zip(entries, local_ids, strict=True)):
            index = first + offset
            num_tokens = min(block_size, self._num_prompt_tokens - index * block_size)
            is_full = num_tokens == block_size
            verified.append(
                verify(
                    entry,
                    self._memory.block(local_id),
                    self._group,
                    block_id=local_id,
                    expected_index=index,
                    expected_num_tokens=num_tokens,
                    expected_chain_hash=grant.chain_hashes[index - grant.first_block_index] if is_full else None,
                )
            )
        return verified

    def _spoil_if_asked(self, blocks: list[VerifiedBlock]) -> None:
        """Zeroes pulled KV when a test asks for it: the answers must then be wrong."""
        if failpoint.is_on("handoff.zero_pulled_kv"):
            for block in blocks:
                page = self._memory.block(block.block_id)
                page[:] = bytes(len(page))


def _settled(read: "Future[int]") -> "asyncio.Future[None]":
    """A future of the running loop that resolves when `read` has, whatever came of it."""
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[None] = loop.create_future()
    read.add_done_callback(lambda _: loop.call_soon_threadsafe(_resolve, settled))
    return settled


def _resolve(settled: "asyncio.Future[None]") -> None:
    if not settled.done():
        settled.set_result(None)
