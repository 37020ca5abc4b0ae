"""Processes are stopped for longer than anybody waits, and continued, as on a host that swaps or sleeps: all is well.

Only a hand-off can answer here, so an answer is proof that a pair works together again. There are four pairs, because
in each of them it is a matter of luck what is under way when it goes on.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

import grpc.aio
import psutil
import pytest

from staffetta.errors import StaffettaError
from staffetta.rpc.session import SILENT_HEARTBEATS
from staffetta.rpc.status import error_from_rpc
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import token_prompts
from tests.e2e.reflected import ReflectedClient, greedy, make_answer
from tests.loop import run

HEARTBEAT_S: Final = 0.5
STOP_S: Final = round(SILENT_HEARTBEATS * HEARTBEAT_S + 0.1, 3)
"""Just longer than a silence may be."""
LONG_STOP_S: Final = 2.5
"""So long that gRPC's keep-alive has noticed too, and that whoever was stopped has been dialled in vain."""
BACK_S: Final = 5.0
"""Within which the system answers again."""
MAX_TOKENS: Final = 1000

TOKEN_IDS: Final = token_prompts(1, seed=3, min_tokens=200, max_tokens=200)[0].token_ids
PREFILL: Final = ("prefill-0", "prefill-1")
DECODE: Final = ("decode-0", "decode-1")
GATEWAY: Final = ("gateway",)
EVERYTHING: Final = ("serve", *GATEWAY, *PREFILL, *DECODE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    flags = ("--prefill", "2", "--decode", "2", "--threads", "1", "--no-local-prefill", "--no-prefix-caching")
    with Cluster(*flags, environ={"STAFFETTA_HEARTBEAT_S": str(HEARTBEAT_S)}) as running:
        yield running


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> tuple[int, ...]:
    """The tokens when nothing is stopped."""
    return ask(cluster, max_tokens=MAX_TOKENS).token_ids


@contextlib.contextmanager
def stopped(cluster: Cluster, *names: str) -> Iterator[None]:
    """Stops processes, and lets them go on afterwards."""
    found = cluster.processes() | {"serve": psutil.Process(cluster.process.pid)}
    try:
        for name in names:
            found[name].suspend()
        yield
    finally:
        for name in reversed(names):
            found[name].resume()


def ask(cluster: Cluster, *, max_tokens: int = 8) -> Answer:
    """The answer, which must come within `BACK_S`; whatever error comes before it asks to be sent the request again."""

    async def ask_until_answered() -> Answer:
        async with ReflectedClient(cluster.grpc) as client, asyncio.timeout(BACK_S):
            while True:
                try:
                    return await client.generate(tokens={"token_ids": TOKEN_IDS}, sampling=greedy(max_tokens))
                except grpc.aio.AioRpcError as error:
                    assert error_from_rpc(error).is_retryable, error.details()

    return run(ask_until_answered())


def stream(cluster: Cluster, names: tuple[str, ...]) -> Answer | StaffettaError:
    """An answer, or what ended it, when processes are stopped after its first tokens."""

    async def stream_and_stop() -> Answer | StaffettaError:
        responses: list[Any] = []
        async with ReflectedClient(cluster.grpc) as client, asyncio.timeout(STOP_S + BACK_S):
            call = client.call("Generate", tokens={"token_ids": TOKEN_IDS}, sampling=greedy(MAX_TOKENS))
            try:
                async for response in call:
                    responses.append(response)
                    if len(responses) == 3:
                        with stopped(cluster, *names):
                            await asyncio.sleep(STOP_S)
            except grpc.aio.AioRpcError as error:
                return error_from_rpc(error)
        started, *deltas, finished = responses
        return make_answer(started.started, [response.delta for response in deltas], finished.finished)

    return run(stream_and_stop())


@pytest.mark.parametrize(
    ("stop_s", "names"),
    [
        # What is due at the end of a silence, and what was sent meanwhile, meet at one moment, in any order.
        (STOP_S, EVERYTHING),
        (STOP_S, EVERYTHING),
        (STOP_S, EVERYTHING),
        (LONG_STOP_S, PREFILL),
        (LONG_STOP_S, DECODE),
        (LONG_STOP_S, GATEWAY),
    ],
)
def test_what_was_stopped_hands_over_again(
    stop_s: float, names: tuple[str, ...], cluster: Cluster, expected: tuple[int, ...]
) -> None:
    with stopped(cluster, *names):
        time.sleep(stop_s)
    answer = ask(cluster)
    assert answer.token_ids == expected[:8]
    assert answer.handoff.prefill_worker in PREFILL
    assert answer.handoff.locally_prefilled_tokens == 0
    cluster.wait_until_linked(timeout_s=BACK_S)
    cluster.wait_until_idle()


@pytest.mark.parametrize("names", [EVERYTHING, DECODE, GATEWAY])
def test_a_stream_that_is_stopped_goes_on_or_ends_with_an_error_that_may_be_retried(
    names: tuple[str, ...], cluster: Cluster, expected: tuple[int, ...]
) -> None:
    ended = stream(cluster, names)
    if isinstance(ended, Answer):
        assert ended.token_ids == expected
    else:
        assert (ended.reason, ended.is_retryable) == ("WORKER_LOST", True)
    cluster.wait_until_idle()
    assert ask(cluster).token_ids == expected[:8]


def test_stopped_prefill_workers_cost_a_running_stream_nothing(cluster: Cluster, expected: tuple[int, ...]) -> None:
    ended = stream(cluster, PREFILL)
    assert isinstance(ended, Answer)
    assert ended.token_ids == expected
    cluster.wait_until_idle()
    assert ask(cluster).token_ids == expected[:8]
