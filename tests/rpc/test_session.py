"""One end of a session: numbers, bounds, silence, and that nothing of it outlives `run`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from staffetta.errors import HandoffFailedError, ProtocolError, WorkerLostError
from staffetta.rpc import session
from staffetta.rpc.options import MAX_MESSAGE_BYTES
from staffetta.rpc.session import SessionPipe
from staffetta.v1 import common_pb2, prefill_pb2
from tests.rpc.in_loop import in_loop, until

Message = prefill_pb2.PrefillSessionRequest
Pipe = SessionPipe[Message, Message]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_the_parts_of_a_prompt_are_the_prompt(token_ids: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "TOKEN_IDS_PER_MESSAGE", 7)
        parts = list(session.prompt_parts(token_ids))
    assert [token_id for part in parts for token_id in part] == token_ids
    assert len(parts) == max(1, -(-len(token_ids) // 7))
    assert all(len(part) == 7 for part in parts[:-1])


class Wire:
    """Both directions of a stream in memory. `is_stuck` stands for a peer that does not read."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[object] = asyncio.Queue()
        self.written: list[Message] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def write(self, message: Message) -> None:
        await self.may_write.wait()
        self.written.append(message)

    def deliver(self, *numbers: int) -> None:
        for number in numbers:
            self.incoming.put_nowait(Message(sequence_number=number))


def make_pipe(wire: Wire, *, heartbeat_s: float = 5.0) -> Pipe:
    return SessionPipe(wire.incoming.get, wire.write, heartbeat_s=heartbeat_s)


def make_message(num_bytes: int = 1) -> Message:
    part = prefill_pb2.AppendPrefillPrompt(handoff_id="x" * num_bytes)
    return Message(append_prompt=part)


def make_heartbeat() -> Message:
    return Message(heartbeat=common_pb2.Heartbeat(engine_turns=7))


async def receive_all(pipe: Pipe) -> None:
    while await pipe.receive() is not None:
        pass


@asynccontextmanager
async def running(
    pipe: Pipe, consume: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    async def consume_all() -> None:
        await (receive_all(pipe) if consume is None else consume())

    task = asyncio.create_task(pipe.run(consume_all(), make_heartbeat=make_heartbeat))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
    assert asyncio.all_tasks() == {asyncio.current_task()}, "run() left a task behind"


@in_loop
async def test_messages_are_written_in_order_and_numbered_from_one() -> None:
    wire = Wire()
    pipe = make_pipe(wire)
    async with running(pipe):
        for size in (1, 2, 3):
            pipe.send(make_message(size))
        await pipe.flush()
    assert [(m.sequence_number, len(m.append_prompt.handoff_id)) for m in wire.written] == [(1, 1), (2, 2), (3, 3)]


@in_loop
async def test_a_session_ends_when_the_peer_closes_its_stream() -> None:
    wire = Wire()
    async with running(make_pipe(wire)) as task:
        wire.deliver(1, 2)
        wire.incoming.put_nowait(grpc.aio.EOF)
        await task


@pytest.mark.parametrize(("numbers", "told"), [((1, 3), (3, 2)), ((2,), (2, 1)), ((1, 1), (1, 2)), ((0,), (0, 1))])
def test_a_gap_or_a_repetition_in_the_numbers_ends_the_session(numbers: tuple[int, ...], told: tuple[int, int]) -> None:
    @in_loop
    async def run() -> None:
        wire = Wire()
        async with running(make_pipe(wire)) as task:
            wire.deliver(*numbers)
            with pytest.raises(ProtocolError) as raised:
                await task
        assert raised.value.message == f"message {told[0]} came where {told[1]} was due; the session ends"

    run()


@in_loop
async def test_silence_of_three_heartbeats_is_a_lost_worker() -> None:
    pipe = make_pipe(Wire(), heartbeat_s=0.02)
    with pytest.raises(WorkerLostError) as raised:
        await pipe.receive()
    assert raised.value.message == "the peer was silent for 0.06 s"


@in_loop
async def test_any_message_ends_the_silence() -> None:
    wire = Wire()
    pipe = make_pipe(wire, heartbeat_s=0.05)
    loop = asyncio.get_running_loop()
    for number in range(1, 5):
        # Each comes late in its own interval of 0.15 s; together they take longer than one.
        loop.call_later(0.08 * number, wire.deliver, number)
    for number in range(1, 5):
        message = await pipe.receive()
        assert message is not None
        assert message.sequence_number == number


@in_loop
async def test_heartbeats_are_sent_whether_or_not_anything_else_is() -> None:
    wire = Wire()
    pipe = make_pipe(wire, heartbeat_s=0.01)
    async with running(pipe, consume=asyncio.Event().wait):  # type: ignore[arg-type]
        await until(lambda: len(wire.written) >= 3)
    assert [m.heartbeat.engine_turns for m in wire.written[:3]] == [7, 7, 7]
    assert [m.sequence_number for m in wire.written[:3]] == [1, 2, 3]


@in_loop
async def test_a_message_above_the_bound_is_refused_and_leaves_no_gap() -> None:
    wire = Wire()
    pipe = make_pipe(wire)
    pipe.send(make_message())
    with pytest.raises(ProtocolError, match=rf"the bound is {MAX_MESSAGE_BYTES}"):
        pipe.send(make_message(MAX_MESSAGE_BYTES))
    pipe.send(make_message())
    async with running(pipe):
        await pipe.flush()
    assert [m.sequence_number for m in wire.written] == [1, 2]


@in_loop
async def test_a_message_of_exactly_the_bound_is_sent() -> None:
    pipe = make_pipe(Wire())
    message = make_message(MAX_MESSAGE_BYTES - 1000)
    message.sequence_number = 1
    missing = MAX_MESSAGE_BYTES - message.ByteSize()
    pipe.send(make_message(MAX_MESSAGE_BYTES - 1000 + missing))


@in_loop
async def test_a_peer_that_never_reads_ends_the_session_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_PENDING_MESSAGES", 10)
    wire = Wire()
    wire.may_write.clear()
    pipe = make_pipe(wire)
    async with running(pipe) as task:
        pipe.send(make_message())
        await asyncio.sleep(0)  # the writer takes one and is stuck with it
        await asyncio.sleep(0)
        for _ in range(10):
            pipe.send(make_message())
        await asyncio.sleep(0)
        assert not task.done()
        pipe.send(make_message())
        with pytest.raises(WorkerLostError, match="left 10 messages unread"):
            await task


@in_loop
async def test_flush_waits_for_the_last_message_queued() -> None:
    wire = Wire()
    wire.may_write.clear()
    pipe = make_pipe(wire)
    await pipe.flush()  # nothing queued: nothing to wait for
    async with running(pipe):
        pipe.send(make_message())
        flushing = asyncio.create_task(pipe.flush())
        await asyncio.sleep(0.01)
        assert not flushing.done()
        wire.may_write.set()
        await flushing
        assert len(wire.written) == 1


@in_loop
async def test_the_first_failure_told_decides() -> None:
    pipe = make_pipe(Wire())
    async with running(pipe) as task:
        pipe.fail(HandoffFailedError("first"))
        pipe.fail(HandoffFailedError("second"))
        with pytest.raises(HandoffFailedError, match="first"):
            await task


@in_loop
async def test_an_exception_of_the_consumer_comes_out_unwrapped() -> None:
    async def consume() -> None:
        raise ZeroDivisionError("mine")

    async with running(make_pipe(Wire()), consume) as task:
        with pytest.raises(ZeroDivisionError, match="mine"):
            await task


@in_loop
async def test_an_exception_of_the_writer_comes_out_unwrapped() -> None:
    async def write(_: Message) -> None:
        raise ConnectionResetError("gone")

    wire = Wire()
    pipe: Pipe = SessionPipe(wire.incoming.get, write, heartbeat_s=5.0)
    async with running(pipe) as task:
        pipe.send(make_message())
        with pytest.raises(ConnectionResetError, match="gone"):
            await task


@in_loop
async def test_a_read_or_write_of_a_cancelled_call_ends_the_session_and_not_its_owner() -> None:
    async def is_cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    reading: Pipe = SessionPipe(is_cancelled, Wire().write, heartbeat_s=5.0)
    writing: Pipe = SessionPipe(Wire().incoming.get, is_cancelled, heartbeat_s=5.0)
    writing.send(make_message())
    for pipe in (reading, writing):
        with pytest.raises(WorkerLostError, match="call was cancelled"):
            await pipe.run(receive_all(pipe), make_heartbeat=make_heartbeat)


async def end_while_writing(consume_end: Callable[[], None]) -> None:
    """Runs a session whose consumer ends by `consume_end` in the turn of the loop in which a write is cancelled."""
    call_ends = asyncio.Event()

    async def consume() -> None:
        await call_ends.wait()
        consume_end()

    async def write(_: Message) -> None:
        await call_ends.wait()
        raise asyncio.CancelledError

    pipe: Pipe = SessionPipe(Wire().incoming.get, write, heartbeat_s=5.0)
    pipe.send(make_message())
    async with running(pipe, consume) as task:
        for _ in range(3):
            await asyncio.sleep(0)
        call_ends.set()
        await task


@in_loop
async def test_why_a_session_ended_is_told_and_not_what_its_end_did_to_a_write() -> None:
    def refuse() -> None:
        raise ProtocolError("refused")

    for _ in range(20):
        with pytest.raises(ProtocolError, match="refused"):
            await end_while_writing(refuse)


@in_loop
async def test_a_session_whose_consumer_is_done_ends_well_whatever_becomes_of_a_write() -> None:
    for _ in range(20):
        await end_while_writing(lambda: None)


@in_loop
async def test_an_exception_of_the_heartbeat_comes_out_unwrapped() -> None:
    def make() -> Message:
        raise LookupError("no engine")

    pipe = make_pipe(Wire(), heartbeat_s=0.01)
    with pytest.raises(LookupError, match="no engine"):
        await pipe.run(receive_all(pipe), make_heartbeat=make)
    assert len(asyncio.all_tasks()) == 1


@in_loop
async def test_cancelling_run_ends_its_tasks_and_lets_the_consumer_clean_up() -> None:
    ended: list[str] = []

    async def consume() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("consumer")

    pipe = make_pipe(Wire())
    task = asyncio.create_task(pipe.run(consume(), make_heartbeat=make_heartbeat))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["consumer"]
    assert len(asyncio.all_tasks()) == 1


@in_loop
async def test_a_message_that_is_being_written_ends_before_the_session_does() -> None:
    wire = Wire()
    wire.may_write.clear()
    pipe = make_pipe(wire)

    async def consume() -> None:
        await pipe.receive()
        raise ProtocolError("refused")

    task = asyncio.create_task(pipe.run(consume(), make_heartbeat=make_heartbeat))
    pipe.send(make_message())
    pipe.send(make_message())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    wire.deliver(1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    wire.may_write.set()
    with pytest.raises(ProtocolError, match="refused"):
        await task
    assert [m.sequence_number for m in wire.written] == [1]
