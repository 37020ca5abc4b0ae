"""Workers die, stall and come back under load; clients notice no more than the failure table of ARCHITECTURE allows."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence

import grpc.aio
import httpx
import pytest

from staffetta.rpc.status import error_from_rpc
from tests.bars.sigkill import FAULTS, Fault, endure, failures, fields_of, flags
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import Prompt, token_prompts
from tests.e2e.reflected import ReflectedClient, greedy
from tests.e2e.waiting import wait_until
from tests.loop import run

BY_STATE = {fault.state: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--prefill", "2", "--decode", "2", "--threads", "1", "--no-prefix-caching") as running:
        yield running


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return token_prompts(6, seed=9, min_tokens=400, max_tokens=800)


@pytest.fixture(scope="module")
def expected(cluster: Cluster, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The tokens when nothing goes wrong."""
    return [answer.token_ids for answer in run(generate_all(cluster, prompts))]


@pytest.fixture(autouse=True)
def whole_again(cluster: Cluster) -> Iterator[None]:
    """After every test the system is whole and holds nothing."""
    yield
    cluster.wait_until_linked()
    cluster.wait_until_idle()


async def generate_all(cluster: Cluster, prompts: Sequence[Prompt]) -> list[Answer]:
    async with ReflectedClient(cluster.grpc) as client:
        return await asyncio.gather(*(client.generate(timeout_s=20, **fields_of(prompt)) for prompt in prompts))


def run_fault(fault: Fault, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]], running: Cluster) -> None:
    toll = run(endure(running, fault, prompts, expected, num_kills=3, seed=4))
    assert failures(toll, num_kills=3) == []
    assert toll.num_requests > 3


@pytest.mark.parametrize("state", ["pulling", "first token sent"])
def test_prefill_workers_killed_in_the_middle_of_hand_offs_cost_no_token(
    state: str, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]]
) -> None:
    fault = BY_STATE[state]
    with Cluster(*flags(fault)) as failing:
        run_fault(fault, prompts, expected, failing)
        failing.wait_until_idle()


def test_prefill_workers_killed_at_random_cost_no_token(
    cluster: Cluster, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]]
) -> None:
    run_fault(BY_STATE["at random, from outside"], prompts, expected, cluster)


def test_a_stopped_prefill_worker_costs_seconds_and_no_token(
    cluster: Cluster, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]]
) -> None:
    with stopped(cluster, "prefill-0"):
        answers = run(asyncio.wait_for(generate_all(cluster, prompts), timeout=12))
    assert [answer.token_ids for answer in answers] == list(expected)
    assert "prefill-0" not in {answer.handoff.prefill_worker for answer in answers}


def test_a_decode_worker_killed_before_the_first_token_is_replaced_unnoticed(
    cluster: Cluster, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]]
) -> None:
    async def lose_one() -> Answer:
        async with ReflectedClient(cluster.grpc) as client:
            # With both prefill workers stopped the request stays where it is, without a token.
            with stopped(cluster, "prefill-0"), stopped(cluster, "prefill-1"):
                asked = asyncio.create_task(client.generate(timeout_s=20, **fields_of(prompts[0])))
                holder = await asyncio.to_thread(wait_for_holder, cluster)
                cluster.signal(holder, signal.SIGKILL)
            return await asked

    assert run(lose_one()).token_ids == expected[0]


def test_a_decode_worker_killed_after_the_first_token_is_a_retryable_error(
    cluster: Cluster, prompts: Sequence[Prompt]
) -> None:
    async def lose_it() -> grpc.aio.AioRpcError:
        async with ReflectedClient(cluster.grpc) as client:
            # Its client reads no further, so the request outlives its credit and is there to be lost.
            call = client.call("Generate", tokens={"token_ids": prompts[0].token_ids}, sampling=greedy(1200))
            async for response in call:
                if response.WhichOneof("event") == "delta":
                    break
            cluster.signal(await asyncio.to_thread(wait_for_holder, cluster), signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                async for _ in call:
                    pass
            return lost.value

    error = run(lose_it())
    failure = error_from_rpc(error)
    assert (error.code(), failure.reason, failure.is_retryable) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", True)


@pytest.mark.parametrize("victim", ["gateway", "zygote"])
def test_a_killed_gateway_or_zygote_comes_back_and_nothing_stays_held(
    victim: str, cluster: Cluster, prompts: Sequence[Prompt], expected: Sequence[tuple[int, ...]]
) -> None:
    async def lose_it() -> grpc.StatusCode:
        async with ReflectedClient(cluster.grpc) as client:
            call = client.call("Generate", tokens={"token_ids": prompts[0].token_ids}, sampling=greedy(1200))
            async for response in call:
                if response.WhichOneof("event") == "delta":
                    break
            cluster.signal(victim, signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                async for _ in call:
                    pass
            return lost.value.code()

    num_ends = cluster.log.ends("SIGKILL")[victim]
    assert run(lose_it()) is grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: cluster.log.ends("SIGKILL")[victim], lambda ends: ends == num_ends + 1, timeout_s=5)
    wait_until(lambda: is_ready(cluster), bool, timeout_s=20)
    cluster.wait_until_linked()
    assert [answer.token_ids for answer in run(generate_all(cluster, prompts))] == list(expected)


def is_ready(cluster: Cluster) -> bool:
    try:
        return httpx.get(f"http://{cluster.http}/ready", timeout=1.0).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def stopped(cluster: Cluster, name: str) -> Iterator[None]:
    """Stops a worker, as a debugger or a swapping host would, and lets it go on afterwards."""
    process = cluster.processes()[name]
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def wait_for_holder(cluster: Cluster) -> str:
    """The decode worker that has the one request there is."""

    def holders() -> list[str]:
        addresses = {name: worker for name, worker in cluster.workers().items() if name.startswith("decode")}
        loads = {name: cluster.load(name) for name in addresses}
        return [name for name, load in loads.items() if load.num_running + load.num_waiting]

    (holder,) = wait_until(holders, lambda found: len(found) == 1, timeout_s=5)
    return holder
