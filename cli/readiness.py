"""Knows when `serve` can serve: every worker is registered, every decode worker linked to every prefill worker.

Then one generation goes through both roles, which is the only proof that counts.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio

from cli.client import Client
from cli.relay import Answer
from staffetta.exits import OperatorError
from staffetta.v1 import inference_pb2, registry_pb2, registry_pb2_grpc

_POLL_S: Final = 0.03
_CALL_S: Final = 2.0
_SELF_TEST_S: Final = 60.0
_TELL_AFTER_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class ReadySystem:
    """The registered workers in the order of their names, and when each was first seen, in seconds since the start."""

    workers: tuple[registry_pb2.RegisteredWorker, ...]
    ready_s: dict[str, float]


async def wait_until_registered(
    client: Client,
    *,
    prefill: Sequence[str],
    decode: Sequence[str],
    started: float,
    say: Callable[[str], None],
) -> ReadySystem:
    """Polls the gateway until nothing is missing; tells what is missing when that takes long. Has no time limit."""
    stub = registry_pb2_grpc.RegistryServiceStub(client.channel)
    ready_s: dict[str, float] = {}
    tell_at = started + _TELL_AFTER_S
    workers: Sequence[registry_pb2.RegisteredWorker] = ()
    while (missing := find_missing(workers, prefill=prefill, decode=decode)) is not None:
        try:
            response = await stub.ListWorkers(registry_pb2.ListWorkersRequest(), timeout=_CALL_S)
            workers = response.workers
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            missing = "the gateway does not answer yet"
        now = time.monotonic()
        for worker in workers:
            ready_s.setdefault(worker.announcement.identity.worker_id, now - started)
        if now >= tell_at:
            say(f"still waiting after {now - started:.0f} s: {missing}")
            tell_at = now + _TELL_AFTER_S
        await asyncio.sleep(_POLL_S)
    return ReadySystem(tuple(workers), ready_s)


def find_missing(
    workers: Sequence[registry_pb2.RegisteredWorker], *, prefill: Sequence[str], decode: Sequence[str]
) -> str | None:
    """What keeps the system from serving, in words; None when nothing does."""
    registered = {worker.announcement.identity.worker_id: worker for worker in workers}
    for name in (*prefill, *decode):
        if name not in registered:
            return f"{name} is not registered"
    for name in decode:
        if not registered[name].has_session:
            return f"the gateway has no session to {name}"
        linked = {link.prefill_worker for link in registered[name].links}
        for peer in prefill:
            if peer not in linked:
                return f"{name} has no link to {peer}"
    return None


async def self_test(client: Client, *, min_tokens: int) -> Answer:
    """Generates two tokens from a prompt of at least `min_tokens` tokens. Raises OperatorError when that fails."""
    request = inference_pb2.GenerateRequest(text=" ".join(str(number) for number in range(min_tokens)))
    request.sampling.temperature = 0.0
    request.sampling.max_tokens = 2
    request.sampling.ignore_eos = True
    return await client.generate(request, timeout_s=_SELF_TEST_S, on_text=lambda _: None)


def check_handoff(answer: Answer) -> None:
    """Raises OperatorError when the decode worker prefilled what should have been handed off."""
    if not answer.prefill_worker:
        raise OperatorError(
            "SELF_TEST",
            "the self-test was not handed off",
            why=f"{answer.decode_worker} prefilled {answer.prompt_tokens} tokens itself, "
            f"{answer.failed_handoffs} hand-offs failed",
            fix="staffetta serve --log-level info",
        )
