"""Several gateway processes behind one pair of doors: what clients, workers and operators see of them."""

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import grpc
import grpc.aio
import psutil
import pytest

from gateway import children
from gateway.__main__ import run_gateway
from staffetta.config.load import load_role
from staffetta.config.schema import GatewayConfig
from staffetta.exits import ExitCode, PortError, UsageError
from staffetta.rpc.channel import open_channel
from staffetta.v1 import common_pb2, registry_pb2_grpc
from tests.gateway.fakes import CLUSTER_KEY
from tests.gateway.processes import (
    NUM_CHILDREN,
    SEVERAL,
    Processes,
    ask,
    command,
    fake_worker,
    make_parent,
    started,
    stream,
    until_started,
)
from tests.gateway.running import asynchronous, eventually, generate, ids_of

TEXT = "one two three"
NUM_STREAMS = 24
"""Of which, by chance, each process of two has at least two, but for one time in 340,000."""


@pytest.fixture(scope="module")
def it() -> Iterator[Processes]:
    with started() as processes:
        yield processes


@asynchronous
async def test_streams_spread_over_the_processes_and_their_metrics_add_up(it: Processes) -> None:
    before = await it.scrape()
    async with fake_worker(it, reply=ids_of(TEXT)) as worker:
        answers = await asyncio.gather(*(stream(it) for _ in range(NUM_STREAMS)))
        assert set(answers) == {TEXT}
        requests = worker.requests_by_session()
        assert len(requests) == NUM_CHILDREN
        assert sorted(map(len, requests))[0] >= 2
        ids = [request_id for session in requests for request_id in session]
        assert len(set(ids)) == len(ids) == NUM_STREAMS
    for _ in range(8):  # whichever process answers
        after = await it.scrape()
        assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == NUM_STREAMS * len(
            ids_of(TEXT)
        )
        count = "vllm:time_to_first_token_seconds_count"
        assert after[count] - before[count] == NUM_STREAMS
        assert after["vllm:request_success_total{stop}"] - before.get("vllm:request_success_total{stop}", 0) == (
            NUM_STREAMS
        )
        assert after["staffetta_gateway_processes"] == NUM_CHILDREN


@asynchronous
async def test_a_worker_that_registers_later_and_one_that_leaves_are_known_to_every_process(it: Processes) -> None:
    assert await it.listed(it.registry) == {}
    async with fake_worker(it, reply=ids_of(TEXT)) as first:
        assert (await it.scrape())["staffetta_kv_blocks{held}{decode-0}"] == 24
        assert (await it.scrape())["staffetta_sessions{decode-0}"] == 1
        async with fake_worker(it, "decode-1", reply=ids_of(TEXT)) as second:
            await asyncio.gather(*(stream(it) for _ in range(2 * NUM_STREAMS)))
            for worker in (first, second):
                assert len(worker.requests_by_session()) == NUM_CHILDREN
        # Its registration is over, and so, in every process, is its turn.
        second.starts = asyncio.Queue()
        for _ in range(8):
            assert list(await it.listed(it.grpc)) == ["decode-0"]
        await asyncio.gather(*(stream(it) for _ in range(8)))
        assert second.starts.empty()


@asynchronous
async def test_both_doors_of_every_process_answer(it: Processes) -> None:
    async with fake_worker(it, reply=ids_of(TEXT)) as worker:
        for _ in range(NUM_STREAMS):
            async with open_channel(it.grpc) as channel:
                said = [message.delta.text async for message in generate(channel, max_tokens=64)]
                assert "".join(said) == TEXT
        assert len(worker.requests_by_session()) == NUM_CHILDREN


@asynchronous
async def test_a_registration_at_the_doors_of_the_clients_is_refused_and_told_the_way(it: Processes) -> None:
    async with open_channel(it.grpc) as channel:
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        # Nothing is written: a write that meets the refusal would take the place of its status.
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "--registry" in (await call.details() or "")


@asynchronous
async def test_a_killed_process_loses_its_own_streams_alone_and_comes_back(it: Processes) -> None:
    ids = ids_of(TEXT)
    async with fake_worker(it, reply=None) as worker:
        before = await it.scrape()
        streams = [asyncio.create_task(stream(it)) for _ in range(NUM_STREAMS)]
        await until_started(worker, NUM_STREAMS)
        sessions = worker.requests_by_session()
        for request_id in (one for session in sessions for one in session):
            worker.emit(request_id, ids[:1])
        killed = it.children()[0]
        killed.kill()
        # What its sequences held on the worker is given up by the end of its session; the others' tokens go on.
        await eventually(lambda: sum(one.done() for one in streams) in map(len, sessions))
        num_lost = sum(one.done() for one in streams)
        for request_id in (one for session in sessions for one in session):
            worker.emit(request_id, ids[1:], at=1, finish=common_pb2.FINISH_REASON_STOP)
        answers = await asyncio.gather(*streams, return_exceptions=True)
        assert sum(isinstance(answer, ConnectionError) for answer in answers) == num_lost
        assert [answer for answer in answers if isinstance(answer, str)] == [TEXT] * (NUM_STREAMS - num_lost)
        await it.until_serving(NUM_CHILDREN)
        await it.until_open("decode-0")
        assert killed.pid not in {child.pid for child in it.children()}
        after = await it.scrape()
        assert after["staffetta_gateway_process_ends_total{SIGKILL}"] == 1
        assert after["vllm:prompt_tokens_total"] >= before["vllm:prompt_tokens_total"]
        worker.reply = ids
        worker.starts = asyncio.Queue()
        answers = await asyncio.gather(*(stream(it) for _ in range(NUM_STREAMS)))
        assert set(answers) == {TEXT}


@asynchronous
async def test_a_connection_that_no_process_has_taken_outlives_the_process(it: Processes) -> None:
    for child in it.children():
        child.suspend()
    # The kernel takes them, and nobody else does.
    asked = [asyncio.create_task(ask(it.http, "/health")) for _ in range(8)]
    await eventually(lambda: num_connections(it) == len(asked))
    for child in it.children():
        child.kill()
    assert all('{"status": "alive"}' in answer for answer in await asyncio.gather(*asked))
    await it.until_serving(NUM_CHILDREN)


def num_connections(it: Processes) -> int:
    """Connections to the REST door that this process has open."""
    _, _, port = it.http.rpartition(":")
    return sum(
        connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port == int(port)
        for connection in psutil.Process().net_connections("tcp")
    )


def test_the_first_signal_drains_every_process_and_none_comes_back() -> None:
    @asynchronous
    async def drained(it: Processes) -> None:
        ids = ids_of(TEXT)
        async with fake_worker(it, reply=None) as worker:
            streams = [asyncio.create_task(stream(it)) for _ in range(NUM_STREAMS)]
            await until_started(worker, NUM_STREAMS)
            it.process.send_signal(signal.SIGTERM)
            while "the gateway is draining" not in await ask(it.http, "/ready"):
                pass
            assert not any(one.done() for one in streams)
            for request_id in (one for session in worker.requests_by_session() for one in session):
                worker.emit(request_id, ids, finish=common_pb2.FINISH_REASON_STOP)
            assert set(await asyncio.gather(*streams)) == {TEXT}
            await eventually(lambda: it.process.poll() is not None)

    with started() as it:
        children = it.children()
        drained(it)
        assert it.process.returncode == 0
        assert psutil.wait_procs(children, timeout=5)[1] == []
        assert not any("Traceback" in line for line in it.log), "".join(it.log)


def test_processes_whose_parent_was_killed_finish_what_they_have_and_leave_the_doors_at_once() -> None:
    ids = ids_of(TEXT)

    @asynchronous
    async def orphaned(it: Processes) -> None:
        async with fake_worker(it, reply=None) as worker:
            streams = [asyncio.create_task(stream(it)) for _ in range(NUM_STREAMS)]
            await until_started(worker, NUM_STREAMS)
            children = it.children()
            it.process.kill()
            it.process.wait()
            # The successor has the same addresses, while the streams of the orphans still run.
            with contextlib.ExitStack() as stack:
                start = started(f"--http={it.http}", f"--grpc={it.grpc}", f"--registry={it.registry}")
                successor = await asyncio.to_thread(stack.enter_context, start)
                assert '{"status": "alive"}' in await ask(successor.http, "/health")
                assert not any(one.done() for one in streams)
                for request_id in (one for session in worker.requests_by_session() for one in session):
                    worker.emit(request_id, ids, finish=common_pb2.FINISH_REASON_STOP)
                assert set(await asyncio.gather(*streams)) == {TEXT}
                await eventually(lambda: not any(child.is_running() for child in children))

    with started() as it:
        orphaned(it)


@asynchronous
async def test_a_process_that_answers_nothing_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PULL_S", 0.2)
    monkeypatch.setattr(children, "MAX_UNANSWERED", 3)
    before = psutil.Process().children()
    parent = make_parent()
    try:
        ready = await parent.start()
        frozen = next(child for child in psutil.Process().children() if child not in before)
        frozen.suspend()
        await eventually(lambda: not frozen.is_running())
        page = ""
        while "staffetta_gateway_processes 2.0" not in page:
            page = await ask(ready.http, "/metrics")
        assert 'staffetta_gateway_process_ends_total{by="SIGKILL"} 1.0' in page
    finally:
        await parent.close()
    assert psutil.Process().children() == before


@asynchronous
async def test_a_drain_that_nobody_waits_for_any_more_leaves_the_processes_their_last_words() -> None:
    before = psutil.Process().children()
    parent = make_parent()
    await parent.start()
    stuck = next(child for child in psutil.Process().children() if child not in before)
    stuck.suspend()
    drain = asyncio.create_task(parent.drain(timeout_s=60))
    await eventually(lambda: len(psutil.Process().children()) == len(before) + 1)
    drain.cancel()
    await asyncio.gather(drain, return_exceptions=True)
    close = asyncio.create_task(parent.close())
    await asyncio.sleep(0)
    stuck.resume()
    await close
    assert psutil.Process().children() == before


@pytest.mark.parametrize("flag", ["http", "grpc", "registry"])
def test_a_taken_port_is_the_operators_error_with_a_fix(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PortError) as refusal:
            start_in_vain(replace(SEVERAL, **{flag: address}))  # type: ignore[arg-type]
    assert refusal.value.fix == f"--{flag} 127.0.0.1:0"


def test_a_second_gateway_of_several_processes_does_not_share_the_first_ones_port(it: Processes) -> None:
    for flag, address in (("http", it.http), ("grpc", it.grpc)):
        done = subprocess.run(command(f"--{flag}={address}"), capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == ExitCode.PORT_OR_PEER
        assert done.stderr.startswith("error[PORT_IN_USE]")


@pytest.mark.parametrize(("num_requests", "fix"), [(47, "--workers 2"), (2, "--workers 1")])
def test_more_processes_than_the_requests_suffice_for_are_the_operators_error(num_requests: int, fix: str) -> None:
    with pytest.raises(UsageError) as refusal:
        start_in_vain(replace(SEVERAL, workers=3, max_requests=num_requests))
    assert refusal.value.fix == fix


@asynchronous
async def test_so_few_requests_that_each_process_can_take_one_with_all_its_choices_suffice() -> None:
    make_parent(replace(SEVERAL, workers=3, max_requests=48))


@pytest.mark.parametrize("number", ["0", "-1", "65", "two"])
def test_a_number_of_processes_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_role(GatewayConfig, ["--workers", number, "--cluster-key", CLUSTER_KEY], environ={})
    assert "workers" in str(refusal.value)


def test_an_address_of_a_registry_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        run_gateway(["--registry", "127.0.0.1:0", "--cluster-key", CLUSTER_KEY])
    assert refusal.value.name == "REGISTRY_UNUSED"


@asynchronous
async def start_in_vain(config: GatewayConfig) -> None:
    await make_parent(config).start()
