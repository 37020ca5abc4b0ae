"""How `serve` ends: Ctrl-C lets requests finish, a second one does not, and even SIGKILL leaves no process behind."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator

import grpc.aio
import pytest

from tests.e2e.cluster import END_S, Cluster
from tests.e2e.reflected import ReflectedClient, greedy, make_answer
from tests.loop import run

FLAGS = ("--prefill", "1", "--decode", "1")
TOKEN_IDS = tuple(range(20, 120))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(*FLAGS) as running:
        yield running


async def refusal(client: ReflectedClient) -> grpc.StatusCode:
    """The code with which a request is refused; the signal may still be on its way from the supervisor."""
    async with asyncio.timeout(END_S):
        while True:
            try:
                await client.generate(timeout_s=5, tokens={"token_ids": TOKEN_IDS}, sampling=greedy(1))
            except grpc.aio.AioRpcError as error:
                return error.code()


def test_ctrl_c_lets_running_requests_finish_and_takes_no_new_ones(cluster: Cluster) -> None:
    async def interrupt() -> None:
        async with ReflectedClient(cluster.grpc) as client:
            call = client.call("Generate", tokens={"token_ids": TOKEN_IDS}, sampling=greedy(600))
            responses = []
            async for response in call:
                responses.append(response)
                if len(responses) == 3:
                    cluster.process.send_signal(signal.SIGINT)
                    await asyncio.to_thread(cluster.log.wait_for, "draining", timeout_s=5)
                    # Asked now, not after the end: once nothing runs, the doors close and calls are cut.
                    assert await refusal(client) is grpc.StatusCode.UNAVAILABLE
            answer = make_answer(
                responses[0].started, [response.delta for response in responses[1:-1]], responses[-1].finished
            )
            assert (answer.finish_reason, len(answer.token_ids)) == ("length", 600)

    run(interrupt())
    assert cluster.process.wait(END_S) == 0
    assert cluster.survivors() == []


def test_a_second_ctrl_c_stops_at_once(cluster: Cluster) -> None:
    async def interrupt_twice() -> None:
        async with ReflectedClient(cluster.grpc) as client:
            # Nobody reads on, so this request never finishes by itself.
            call = client.call("Generate", tokens={"token_ids": TOKEN_IDS}, sampling=greedy(1900))
            async for response in call:
                if response.WhichOneof("event") == "delta":
                    break
            cluster.process.send_signal(signal.SIGINT)
            await asyncio.to_thread(cluster.log.wait_for, "draining", timeout_s=5)
            cluster.process.send_signal(signal.SIGINT)
            await asyncio.to_thread(cluster.process.wait, END_S)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                async for _ in call:
                    pass
            assert lost.value.code() is grpc.StatusCode.UNAVAILABLE

    run(interrupt_twice())
    assert any("stopped at once" in line for line in cluster.log.lines())
    assert cluster.survivors() == []


def test_killing_the_supervisor_kills_everything_it_started(cluster: Cluster) -> None:
    assert sorted(cluster.processes()) == ["decode-0", "gateway", "prefill-0", "zygote"]
    cluster.process.kill()
    assert cluster.process.wait(END_S) == -signal.SIGKILL
    assert cluster.survivors() == []


def test_a_process_that_is_left_behind_is_found() -> None:
    """The guard of all tests here, which would otherwise pass whatever is left."""
    with pytest.raises(AssertionError, match=r"left behind by .*sleep \(pid"), Cluster("--prefill", "0") as alone:
        marked = {**os.environ, "TMPDIR": alone.processes()["gateway"].environ()["TMPDIR"]}
        stray = subprocess.Popen(["sleep", "60"], env=marked)
    assert stray.wait(END_S) == -signal.SIGKILL
