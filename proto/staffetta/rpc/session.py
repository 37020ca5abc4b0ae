"""One end of a session stream: numbered messages, one writer, a bound on what waits, a watch on silence.

Both halves of `DecodeService.Session` and `PrefillService.Session`, client and server, are a `SessionPipe`. The owner
awaits `run` with a coroutine that consumes `receive`. What the messages mean is the owner's business.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, cast

import grpc.aio

from staffetta.errors import ProtocolError, StaffettaError, WorkerLostError
from staffetta.rpc.options import MAX_MESSAGE_BYTES
from staffetta.rpc.patience import Patience

PROTOCOL_VERSION = 1
SILENT_HEARTBEATS = 3
MAX_PENDING_MESSAGES = 16384
LAST_WRITE_S = 0.5
TOKEN_IDS_PER_MESSAGE = 32 * 1024
"""A varint of a token id takes at most 5 bytes, so a full part stays below the message bound."""


def prompt_parts(token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Splits a prompt into runs that fit one session message each; at least one run, the first may be the only one."""
    yield token_ids[:TOKEN_IDS_PER_MESSAGE]
    for start in range(TOKEN_IDS_PER_MESSAGE, len(token_ids), TOKEN_IDS_PER_MESSAGE):
        yield token_ids[start : start + TOKEN_IDS_PER_MESSAGE]


class Numbered(Protocol):
    """A protobuf message of a session."""

    sequence_number: int

    def ByteSize(self) -> int:  # noqa: N802 - protobuf's name
        """Serialized size in bytes."""


In = TypeVar("In", bound=Numbered)
Out = TypeVar("Out", bound=Numbered)


class SessionPipe(Generic[In, Out]):
    """One end of a session. Event loop only.

    `send` never waits: messages queue up and one task writes them in order. The queue is bounded by the credits of the
    requests it carries; should it still reach `MAX_PENDING_MESSAGES`, the peer does not read and `run` ends.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[object]],
        write: Callable[[Out], Awaitable[None]],
        *,
        heartbeat_s: float,
    ) -> None:
        self._read = read
        self._write = write
        self._heartbeat_s = heartbeat_s
        self._peer_heartbeat_s = heartbeat_s
        self._patience = Patience()
        self._pending: deque[Out] = deque()
        self._has_pending = asyncio.Event()
        self._is_drained = asyncio.Event()
        self._is_drained.set()
        self._num_sent = 0
        self._num_received = 0
        self._failure: StaffettaError | None = None
        self._has_failed = asyncio.Event()
        self._is_ending = False

    def send(self, message: Out) -> None:
        """Numbers `message` and queues it. Raises ProtocolError for one above the bound of 256 KiB."""
        message.sequence_number = self._num_sent + 1
        _check_size(message)
        if len(self._pending) >= MAX_PENDING_MESSAGES:
            # From another task than the writer's: that one may be waiting for the peer to read, maybe for ever.
            self.fail(WorkerLostError(f"the peer left {MAX_PENDING_MESSAGES} messages unread"))
            return
        self._num_sent += 1
        self._pending.append(message)
        self._is_drained.clear()
        self._has_pending.set()

    def expect_heartbeats(self, every_s: float) -> None:
        """Takes the interval that the peer stated when the session opened; until then ours counts.

        Raises ProtocolError for one that is no interval: silence would never, or always, be noticed.
        """
        if not 0.01 <= every_s <= 60.0:
            raise ProtocolError(f"heartbeat_s is {every_s:g} at the peer, must be 0.01 to 60")
        self._peer_heartbeat_s = every_s

    def fail(self, error: StaffettaError) -> None:
        """Makes `run` raise `error` soon. The first call decides."""
        if self._failure is None:
            self._failure = error
            self._has_failed.set()

    async def flush(self) -> None:
        """Waits until everything queued so far has been handed to the transport."""
        await self._is_drained.wait()

    async def run(self, consume: Coroutine[object, object, None], *, make_heartbeat: Callable[[], Out]) -> None:
        """Runs the session until `consume`, which receives its messages, returns or anything raises.

        Raises CancelledError only to whoever cancels it.
        """
        writer = asyncio.create_task(self._run_writer())
        tasks = [
            asyncio.create_task(consume),
            asyncio.create_task(self._run_heartbeat(make_heartbeat)),
            asyncio.create_task(self._watch_failure()),
        ]
        try:
            done, _ = await asyncio.wait([*tasks, writer], return_when=asyncio.FIRST_COMPLETED)
            # Why the session ends, before what its end did to a message that was being written.
            for task in [task for task in tasks if task in done] or [writer]:
                if task.cancelled():
                    # By nobody here: gRPC raises CancelledError from a write under way when its call is cancelled, as a
                    # read does that has waited for too long. Passed on, it would end our owner, who would serve on.
                    raise WorkerLostError("the session's call was cancelled")
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._end_writer(writer)
            finally:
                writer.cancel()

    async def _run_writer(self) -> None:
        """Writes queued messages until it is told to end, which it does between two messages."""
        while not self._is_ending:
            await self._has_pending.wait()
            self._has_pending.clear()
            while self._pending and not self._is_ending:
                await self._write(self._pending.popleft())
            self._is_drained.set()

    async def _end_writer(self, writer: "asyncio.Task[None]") -> None:
        """Lets the message end that is being written, unless the peer does not read.

        A write that is cancelled half way can keep the status of a server's call, and with it the reason of the end,
        from ever reaching the peer.
        """
        self._is_ending = True
        self._has_pending.set()
        await asyncio.wait({writer}, timeout=LAST_WRITE_S)
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)

    async def _watch_failure(self) -> None:
        """Raises what `fail` was told."""
        await self._has_failed.wait()
        assert self._failure is not None, "fail() sets both"
        raise self._failure

    async def _run_heartbeat(self, make: Callable[[], Out]) -> None:
        """Sends `make()` every heartbeat interval until cancelled."""
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.send(make())

    async def receive(self) -> In | None:
        """The next message, or None at the stream's end.

        Raises WorkerLostError after three of the peer's heartbeat intervals without a word, and ProtocolError for a
        gap in the numbers or a message above the bound.
        """
        limit_s = self._peer_heartbeat_s * SILENT_HEARTBEATS
        try:
            message = await self._patience.wait(self._read, limit_s=limit_s)
        except TimeoutError:
            raise WorkerLostError(f"the peer was silent for {limit_s:g} s") from None
        if message is grpc.aio.EOF:
            return None
        numbered = cast(In, message)
        _check_size(numbered)
        self._num_received += 1
        if numbered.sequence_number != self._num_received:
            raise ProtocolError(
                f"message {numbered.sequence_number} came where {self._num_received} was due; the session ends"
            )
        return numbered


def _check_size(message: Numbered) -> None:
    """Raises ProtocolError for a message above the bound: one that large would hold up every request of the session."""
    if (num_bytes := message.ByteSize()) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a session message has {num_bytes} bytes, the bound is {MAX_MESSAGE_BYTES}")
