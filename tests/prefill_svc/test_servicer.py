"""The prefill worker's session, from the other end of the wire: what is announced, held, refused and freed."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc.aio
import pytest

from demo import MODEL_DIR
from engine.model_config import ModelConfig
from kvtransfer.checksum import head_checksums
from kvtransfer.layout import BlockId
from kvtransfer.ticket import TicketBook, TicketVerdict
from prefill_svc import announcing
from prefill_svc import handoff as handoff_module
from prefill_svc.main import PrefillService
from staffetta.errors import IncompatiblePeerError, ProtocolError, StaffettaError
from staffetta.hashing import BlockHasher
from staffetta.rpc.channel import open_channel
from staffetta.rpc.session import PROTOCOL_VERSION
from staffetta.rpc.status import error_from_rpc
from staffetta.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from tests.handoff.cluster import CLUSTER_KEY, RunningWorker, make_prompt, prefill_worker, until_counts, until_idle
from tests.rpc.in_loop import in_loop, until


class Reader:
    """A decode worker's end of the session, without a decode worker. Reads only when it is told to."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = prefill_pb2_grpc.PrefillServiceStub(channel).Session()
        self.num_sent = 0
        self.opened = prefill_pb2.PrefillSessionOpened()
        self.events: list[prefill_pb2.PrefillEvent] = []
        self.num_messages = 0

    async def send(self, **command: Any) -> None:
        self.num_sent += 1
        await self.call.write(prefill_pb2.PrefillSessionRequest(sequence_number=self.num_sent, **command))

    async def open(self, worker: RunningWorker, **changes: Any) -> None:
        identity = common_pb2.WorkerIdentity()
        identity.CopyFrom(worker.host.rank.identity)
        identity.worker_id = "decode-9"
        version = changes.pop("protocol_version", PROTOCOL_VERSION)
        for name, value in changes.items():
            setattr(identity, name, value)
        await self.send(
            open=prefill_pb2.OpenPrefillSession(protocol_version=version, identity=identity, heartbeat_s=1.0)
        )
        first = await self.call.read()
        assert isinstance(first, prefill_pb2.PrefillSessionResponse)
        self.opened = first.opened

    async def start(self, prompt: list[int], **fields: Any) -> str:
        handoff_id: str = fields.pop("handoff_id", secrets.token_hex(16))
        sampling = common_pb2.SamplingParams(temperature=0, top_p=1, top_k=0, seed=1, max_tokens=4, ignore_eos=True)
        values: dict[str, Any] = {"num_prompt_tokens": len(prompt), "token_ids": prompt, "lease_s": 30.0}
        values["sampling"] = sampling
        await self.send(start=prefill_pb2.StartPrefill(handoff_id=handoff_id, **values | fields))
        return handoff_id

    async def release(self, handoff_id: str) -> None:
        await self.send(release=prefill_pb2.ReleasePrefill(handoff_id=handoff_id))

    async def until(self, handoff_id: str, *kinds: str) -> list[prefill_pb2.PrefillEvent]:
        """Reads until an event of each kind has come for the hand-off ("last" is its last chunk); returns its."""
        while True:
            events = [event for event in self.events if event.handoff_id == handoff_id]
            seen: set[str | None] = {event.WhichOneof("event") for event in events}
            seen.update("last" for event in events if event.chunk_ready.is_last)
            if seen.issuperset(kinds):
                return events
            message = await self.call.read()
            assert isinstance(message, prefill_pb2.PrefillSessionResponse)
            self.num_messages += bool(message.events.events)
            self.events.extend(message.events.events)


@asynccontextmanager
async def reader_of(worker: RunningWorker, **changes: Any) -> AsyncIterator[Reader]:
    async with open_channel(worker.address) as channel:
        reader = Reader(channel)
        await reader.open(worker, **changes)
        yield reader
        reader.call.cancel()


async def refusal(worker: RunningWorker, *commands: dict[str, Any], **changes: Any) -> StaffettaError:
    """How a session that begins so is ended by the worker."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async with reader_of(worker, **changes) as reader:
            for command in commands:
                await reader.send(**command)
            while await reader.call.read() is not grpc.aio.EOF:
                pass
    return error_from_rpc(raised.value)


def blocks_of(events: list[prefill_pb2.PrefillEvent]) -> list[prefill_pb2.BlockEntry]:
    return [block for event in events for block in event.chunk_ready.blocks]


# What is announced


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 48, 100])
def test_the_chunks_describe_every_block_of_the_prompt_in_order(num_tokens: int) -> None:
    @in_loop
    async def run() -> None:
        prompt = make_prompt(num_tokens)
        async with prefill_worker(max_batch_tokens=32) as worker, reader_of(worker) as reader:
            handoff_id = await reader.start(prompt)
            events = await reader.until(handoff_id, "last", "first_tokens")
            blocks = blocks_of(events)
            num_blocks = -(-num_tokens // 16)
            assert [block.block_index for block in blocks] == list(range(num_blocks))
            assert [block.num_tokens for block in blocks] == [
                min(16, num_tokens - index * 16) for index in range(num_blocks)
            ]
            chain = BlockHasher(bytes.fromhex(CLUSTER_KEY), block_size=16).chain(prompt)
            assert [block.chain_hash for block in blocks] == [*chain, b""][:num_blocks]
            rank = worker.host.rank
            for block in blocks:
                page = rank.memory.block(BlockId(block.block_id))
                assert tuple(block.head_checksums) == head_checksums(page, rank.layout.groups[0])
            chunks = [event.chunk_ready for event in events if event.HasField("chunk_ready")]
            assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            assert chunks[-1].num_ready_tokens == num_tokens
            assert [chunk.num_ready_tokens for chunk in chunks[:-1]] == [
                sum(block.num_tokens for chunk in chunks[: number + 1] for block in chunk.blocks)
                for number in range(len(chunks) - 1)
            ]
            assert len(chunks) == -(-num_tokens // 32)
            assert len({chunk.ticket for chunk in chunks}) == 1
            (offer,) = reader.opened.transports
            ids = [block.block_id for block in blocks]
            assert rank.tickets.check(chunks[0].ticket, offer.session_key, ids) is TicketVerdict.VALID
            await reader.release(handoff_id)
            await until_idle(worker)
            assert rank.tickets.check(chunks[0].ticket, offer.session_key, ids) is TicketVerdict.UNKNOWN

    run()


@pytest.mark.parametrize(
    ("num_tokens", "num_held", "indices"), [(40, 16, [1, 2]), (40, 32, [2]), (32, 32, []), (32, 16, [1])]
)
def test_blocks_that_the_reader_holds_are_not_announced(num_tokens: int, num_held: int, indices: list[int]) -> None:
    @in_loop
    async def run() -> None:
        async with prefill_worker() as worker, reader_of(worker) as reader:
            handoff_id = await reader.start(make_prompt(num_tokens), num_held_tokens=num_held)
            events = await reader.until(handoff_id, "last", "first_tokens")
            assert [block.block_index for block in blocks_of(events)] == indices
            (last,) = [event.chunk_ready for event in events if event.chunk_ready.is_last]
            assert last.num_ready_tokens == num_tokens

    run()


@in_loop
async def test_many_blocks_are_announced_in_messages_below_the_bound() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        worker.service._announcer._blocks_per_message = 2  # type: ignore[attr-defined]
        handoff_id = await reader.start(make_prompt(100))
        events = await reader.until(handoff_id, "last", "first_tokens")
        sizes = [len(event.chunk_ready.blocks) for event in events if event.HasField("chunk_ready")]
        assert sizes == [2, 2, 2, 1]


@in_loop
async def test_a_chunk_holds_as_many_blocks_as_its_bound_has_bytes_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig.from_directory(MODEL_DIR)
    layout = model.kv_layout(block_size=16, dtype="float32", model_digest="any")
    monkeypatch.setattr(announcing, "CHUNK_BYTES", 4 * layout.groups[0].block_bytes - 1)
    async with prefill_worker() as worker, reader_of(worker) as reader:
        events = await reader.until(await reader.start(make_prompt(100)), "last", "first_tokens")
        sizes = [len(event.chunk_ready.blocks) for event in events if event.HasField("chunk_ready")]
        assert sizes == [3, 3, 1]


@in_loop
async def test_many_first_tokens_of_one_step_are_split_over_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_module, "EVENTS_PER_MESSAGE", 1)
    async with prefill_worker() as worker, reader_of(worker) as reader:
        ids = [await reader.start(make_prompt(3, seed=seed)) for seed in range(6)]
        for handoff_id in ids:
            await reader.until(handoff_id, "last", "first_tokens")
        assert reader.num_messages == len(reader.events)


@in_loop
async def test_a_prompt_in_parts_is_computed_when_it_is_whole() -> None:
    prompt = make_prompt(50)
    async with prefill_worker() as worker, reader_of(worker) as reader, reader_of(worker) as other:
        whole = await reader.start(prompt)
        handoff_id = await reader.start(prompt[:20], num_prompt_tokens=50)
        part = prefill_pb2.AppendPrefillPrompt(handoff_id=handoff_id, token_ids=[1] * 30)
        await other.send(append_prompt=part)  # another session's: ignored
        await other.until(await other.start(prompt), "first_tokens")
        for start in (20, 21, 50):
            end = {20: 21, 21: 50, 50: 50}[start]
            part = prefill_pb2.AppendPrefillPrompt(handoff_id=handoff_id, token_ids=prompt[start:end])
            await reader.send(append_prompt=part)
        tokens = [
            event.first_tokens.tokens[0].token_id
            for each in (whole, handoff_id)
            for event in await reader.until(each, "first_tokens", "last")
            if event.HasField("first_tokens")
        ]
        assert tokens[0] == tokens[1]


# What is refused


@in_loop
async def test_another_model_is_refused_with_both_digests() -> None:
    async with prefill_worker() as worker:
        error = await refusal(worker, model_digest="theirs")
        ours = worker.host.rank.identity.model_digest
        assert isinstance(error, IncompatiblePeerError)
        assert f"model_digest is theirs at decode-9 and {ours} at prefill-0" in error.message
        assert worker.service.num_sessions() == 0


@in_loop
async def test_another_protocol_is_refused_with_both_versions() -> None:
    async with prefill_worker() as worker:
        error = await refusal(worker, protocol_version=9)
        assert error.message == "protocol_version is 9 at the peer and 1 here; they may differ by 1"


@pytest.mark.parametrize(
    "command",
    [{}, {"open": prefill_pb2.OpenPrefillSession()}],
    ids=["empty", "open again"],
)
def test_a_command_out_of_place_ends_the_session(command: dict[str, Any]) -> None:
    @in_loop
    async def run() -> None:
        async with prefill_worker() as worker:
            error = await refusal(worker, command)
            assert isinstance(error, ProtocolError)
            assert "has no place in an open session" in error.message
            await until(lambda: worker.service.num_sessions() == 0)

    run()


@in_loop
async def test_a_hand_off_started_twice_ends_the_session_and_frees_it() -> None:
    handoff_id = "cd" * 16
    sampling = common_pb2.SamplingParams(temperature=0, top_p=1, top_k=0, seed=1, max_tokens=4)
    start = prefill_pb2.StartPrefill(
        handoff_id=handoff_id, num_prompt_tokens=20, token_ids=make_prompt(20), sampling=sampling, lease_s=30.0
    )
    async with prefill_worker() as worker:
        error = await refusal(worker, {"start": start}, {"start": start})
        assert error.message == f"hand-off {handoff_id} was started twice"
        await until_idle(worker)


BAD_STARTS: dict[str, dict[str, Any]] = {
    "id": {"handoff_id": "x"},
    "vocabulary": {"token_ids": [10**6] * 20},
    "held, not whole blocks": {"num_held_tokens": 8},
    "held, more than the prompt": {"num_held_tokens": 32},
    "no lease": {"lease_s": 0.0},
    "endless lease": {"lease_s": 601.0},
    "a lease that is no number": {"lease_s": float("nan")},
    "too many": {"num_prompt_tokens": 19},
}


@in_loop
async def test_a_start_that_makes_no_sense_fails_alone() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        good = await reader.start(make_prompt(20))
        for change in BAD_STARTS.values():
            handoff_id = await reader.start(make_prompt(20), **change)
            (event,) = await reader.until(handoff_id, "failed")
            assert event.failed.reason == "INVALID_REQUEST"
        too_long = await reader.start(make_prompt(20), num_prompt_tokens=100_000)
        (event,) = await reader.until(too_long, "failed")
        assert event.failed.reason == "CONTEXT_LENGTH_EXCEEDED"
        await reader.until(good, "last", "first_tokens")
        await reader.release(good)
        await until_idle(worker)


@in_loop
async def test_a_full_worker_refuses_and_a_draining_one_too() -> None:
    async with prefill_worker(max_requests=1) as worker, reader_of(worker) as reader:
        held = await reader.start(make_prompt(20))
        await reader.until(held, "last", "first_tokens")
        (event,) = await reader.until(await reader.start(make_prompt(20)), "failed")
        assert (event.failed.reason, event.failed.is_retryable) == ("QUEUE_FULL", True)
        worker.service.begin_drain()
        (event,) = await reader.until(await reader.start(make_prompt(20)), "failed")
        assert (event.failed.reason, event.failed.message) == (
            "DRAINING",
            "prefill-0 is draining; use another prefill worker",
        )
        assert worker.service.num_requests() == 1  # what was accepted is still held for its reader
        assert worker.service.cancel_all() == 1
        events = await reader.until(held, "failed")
        assert events[-1].failed.message == "prefill-0 is shutting down"
        await until_idle(worker)


@in_loop
async def test_a_chunk_that_gets_no_ticket_fails_its_own_hand_off() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        worker.host.rank.tickets = TicketBook(max_tickets=1)
        first = await reader.start(make_prompt(20, seed=1))
        await reader.until(first, "last", "first_tokens")
        second = await reader.start(make_prompt(20, seed=2))
        events = await reader.until(second, "failed")
        assert events[-1].failed.reason == "RESOURCE_EXHAUSTED"
        await reader.release(first)
        await reader.until(await reader.start(make_prompt(20, seed=3)), "last", "first_tokens")


# What is held, and until when


@in_loop
async def test_blocks_are_held_until_they_are_released() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader, reader_of(worker) as other:
        handoff_id = await reader.start(make_prompt(100))
        await reader.until(handoff_id, "last", "first_tokens")
        counts = await worker.counts()
        assert (counts.held_blocks, counts.num_held) == (7, 1)
        await other.release(handoff_id)  # not its own: nothing happens
        await other.release("unknown")
        await other.until(await other.start(make_prompt(5)), "first_tokens")
        assert (await worker.counts()).held_blocks == 8
        for _ in range(2):
            await reader.release(handoff_id)
        await until_counts(worker, lambda counts: counts.held_blocks == 1)


@in_loop
async def test_a_release_while_the_prompt_is_computed_frees_it_at_once() -> None:
    async with prefill_worker(max_batch_tokens=16) as worker, reader_of(worker) as reader:
        handoff_id = await reader.start(make_prompt(200))
        await reader.until(handoff_id, "chunk_ready")
        await reader.release(handoff_id)
        await until_idle(worker)


@in_loop
async def test_a_session_that_breaks_frees_everything_it_had() -> None:
    async with prefill_worker(max_batch_tokens=16) as worker, reader_of(worker) as other:
        kept = await other.start(make_prompt(20, seed=9))
        await other.until(kept, "last", "first_tokens")
        async with reader_of(worker) as reader:
            held = await reader.start(make_prompt(50, seed=1))
            await reader.until(held, "last", "first_tokens")
            await reader.start(make_prompt(500, seed=2))
            await reader.start(make_prompt(10), num_prompt_tokens=20)
            (offer,) = reader.opened.transports
        await until(lambda: worker.service.num_sessions() == 1)
        await until_counts(worker, lambda counts: counts.held_blocks == 2)
        assert worker.service.num_requests() == 1
        (exporter,) = worker.service._exporters  # type: ignore[attr-defined]
        assert offer.session_key not in exporter.session_keys
        assert len(exporter.session_keys) == 1


@in_loop
async def test_blocks_that_nobody_reads_are_freed_when_their_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "LEASE_SWEEP_S", 0.01)
    async with prefill_worker() as worker, reader_of(worker) as reader:
        short = await reader.start(make_prompt(50, seed=1), lease_s=0.05)
        long = await reader.start(make_prompt(50, seed=2), lease_s=30.0)
        nothing = await reader.start(make_prompt(32, seed=3), lease_s=0.05, num_held_tokens=32)
        for handoff_id in (short, nothing):
            events = await reader.until(handoff_id, "first_tokens", "last", "failed")
            assert events[-1].failed.reason == "HANDOFF_FAILED"
            assert events[-1].failed.message.startswith("the blocks were not read within their lease")
        await reader.until(long, "last", "first_tokens")
        assert worker.service.num_requests() == 1
        await until_counts(worker, lambda counts: counts.held_blocks == 4)
        await asyncio.sleep(0)
        assert [event.WhichOneof("event") for event in reader.events if event.handoff_id == long].count("failed") == 0


@in_loop
async def test_a_sign_of_life_renews_leases_up_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "LEASE_SWEEP_S", 0.01)
    async with prefill_worker() as worker, reader_of(worker) as reader:
        handoff_id = await reader.start(make_prompt(50, seed=1), lease_s=30.0)
        await reader.until(handoff_id, "last", "first_tokens")
        handoff = cast(PrefillService, worker.service)._announcer._handoffs[handoff_id]
        before = handoff.lease_ends
        await reader.send(heartbeat=common_pb2.Heartbeat())
        await until(lambda: handoff.lease_ends > before)
        handoff.held_until = 0.0
        events = await reader.until(handoff_id, "failed")
        assert events[-1].failed.reason == "HANDOFF_FAILED"
