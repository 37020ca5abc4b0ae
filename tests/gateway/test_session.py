"""What the gateway makes of a decode worker's heartbeats."""

import asyncio
import itertools
from collections.abc import Iterable

import pytest

from gateway import session
from gateway.session import LOST_HEARTBEATS, STALLED_HEARTBEATS, DecodeSession, Pipe
from staffetta.errors import WorkerLostError
from staffetta.v1 import common_pb2, decode_pb2
from tests.gateway.fakes import HEARTBEAT_S
from tests.gateway.running import asynchronous, ids_of, running

HI = {"messages": [{"role": "user", "content": "hi"}]}


def make_session(heartbeats: Iterable[common_pb2.Heartbeat]) -> DecodeSession:
    """A session whose worker sends `heartbeats` and then nothing more."""
    messages = enumerate(heartbeats, start=1)
    unread: asyncio.Queue[object] = asyncio.Queue()
    for number, heartbeat in messages:
        unread.put_nowait(decode_pb2.DecodeSessionResponse(sequence_number=number, heartbeat=heartbeat))

    async def write(message: decode_pb2.DecodeSessionRequest) -> None:
        raise NotImplementedError

    return DecodeSession(Pipe(unread.get, write, heartbeat_s=0.01), "decode-0")


async def read(worker: DecodeSession) -> str:
    """Reads to the loss of the worker; what it says."""
    with pytest.raises(WorkerLostError) as loss:
        await worker.read()
    return loss.value.message


@pytest.mark.parametrize("num_requests", [0, 3])
@asynchronous
async def test_an_engine_that_does_not_turn_is_stalled_whatever_it_holds(num_requests: int) -> None:
    still = common_pb2.Heartbeat(engine_turns=7, num_requests=num_requests)
    flags = []
    for num_equal in (STALLED_HEARTBEATS - 1, STALLED_HEARTBEATS):
        worker = make_session([still] * (1 + num_equal))
        assert await read(worker) == "the peer was silent for 0.03 s"
        flags.append(worker.is_stalled)
    assert flags == [False, True]


@asynchronous
async def test_an_engine_that_turns_holding_requests_is_never_stalled() -> None:
    worker = make_session(common_pb2.Heartbeat(engine_turns=turn, num_requests=3) for turn in range(1, 100))
    assert await read(worker) == "the peer was silent for 0.03 s"
    assert not worker.is_stalled


@asynchronous
async def test_one_turn_clears_a_stall() -> None:
    turns = [7] * (1 + STALLED_HEARTBEATS) + [8]
    worker = make_session(common_pb2.Heartbeat(engine_turns=turn) for turn in turns)
    await read(worker)
    assert not worker.is_stalled


@asynchronous
async def test_a_worker_whose_engine_stays_still_is_lost() -> None:
    worker = make_session([common_pb2.Heartbeat(engine_turns=7)] * (1 + LOST_HEARTBEATS))
    assert await read(worker) == f"the worker's engine stood still for {LOST_HEARTBEATS} heartbeats"


@asynchronous
async def test_requests_on_a_wedged_engine_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LOST_HEARTBEATS", 2)
    async with running(reply=None) as it:
        it.worker.engine_turns = itertools.repeat(7)
        other = await it.add_worker("decode-1", reply=ids_of("a"))
        other.is_draining = True
        response = asyncio.create_task(it.http.post("/v1/chat/completions", json=HI))
        await it.worker.starts.get()
        other.is_draining = False
        assert (await response).json()["staffetta"]["handoff"]["decode_worker"] == "decode-1"


@asynchronous
async def test_silence_is_measured_in_the_workers_own_interval() -> None:
    worker = make_session([])
    identity = common_pb2.WorkerIdentity(worker_id="decode-0")
    opened = decode_pb2.DecodeSessionOpened(identity=identity, heartbeat_s=0.02)
    worker.accept(decode_pb2.DecodeSessionResponse(opened=opened), identity)
    assert await read(worker) == "the peer was silent for 0.06 s"


@asynchronous
async def test_the_gateway_states_its_own_interval() -> None:
    async with running() as it:
        assert it.worker.gateway_heartbeat_s == HEARTBEAT_S
