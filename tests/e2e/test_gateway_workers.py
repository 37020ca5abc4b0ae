"""A whole system whose doors are two processes: fifty streams at once are right, and a killed parent is followed."""

import asyncio
import signal
from collections.abc import Iterator, Sequence

import httpx
import pytest

from demo.corpus import RecallSample
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import recall_prompts
from tests.e2e.rest import chat_streamed, open_rest
from tests.e2e.waiting import wait_until
from tests.loop import run

NUM_STREAMS = 50


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--gateway-workers", "2", "--no-prefix-caching") as running:
        yield running


def ask(cluster: Cluster, samples: Sequence[RecallSample], *, num_at_once: int) -> list[Answer]:
    async def ask_all() -> list[Answer]:
        turn = asyncio.Semaphore(num_at_once)
        async with open_rest(cluster.http) as rest:

            async def ask_one(sample: RecallSample) -> Answer:
                async with turn:
                    return await chat_streamed(rest, sample.prompt, max_tokens=8)

            return await asyncio.gather(*map(ask_one, samples))

    return run(ask_all())


def test_fifty_streams_at_once_are_the_answers_that_one_after_the_other_gives(cluster: Cluster) -> None:
    samples = recall_prompts(NUM_STREAMS, seed=11)
    together = ask(cluster, samples, num_at_once=NUM_STREAMS)
    alone = ask(cluster, samples, num_at_once=1)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    num_right = sum(answer.text.strip() == sample.answer for answer, sample in zip(together, samples, strict=True))
    assert num_right >= 0.97 * NUM_STREAMS
    assert all(answer.handoff.prefill_worker == "prefill-0" for answer in together)
    page = httpx.get(f"http://{cluster.http}/metrics").text.splitlines()
    assert "staffetta_gateway_processes 2.0" in page
    # The self-test and the sample go through the same doors.
    counted = next(line for line in page if line.startswith("vllm:e2e_request_latency_seconds_count"))
    assert float(counted.rpartition(" ")[2]) >= 2 * NUM_STREAMS
    cluster.wait_until_idle()


def test_a_killed_parent_is_followed_by_another_on_the_same_doors(cluster: Cluster) -> None:
    killed = cluster.signal("gateway", signal.SIGKILL)
    wait_until(lambda: cluster.processes(), lambda now: "gateway" in now and now["gateway"].pid != killed, timeout_s=20)
    wait_until(lambda: is_ready(cluster), bool, timeout_s=20)
    cluster.wait_until_linked()
    samples = recall_prompts(8, seed=12)
    assert [answer.text for answer in ask(cluster, samples, num_at_once=8)] == [
        answer.text for answer in ask(cluster, samples, num_at_once=1)
    ]


def is_ready(cluster: Cluster) -> bool:
    try:
        return httpx.get(f"http://{cluster.http}/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
