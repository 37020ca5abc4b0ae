"""Restarts requests after some of their tokens, on a decode worker's session: as a gateway does when a worker is lost.

Clients cannot do this: the position of the first token decides the random numbers, and no door lets it be set.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.session import DecodeSession, run_session
from staffetta.v1 import common_pb2, decode_pb2, registry_pb2
from tests.bars.concurrent import run_all
from tests.same_tokens.asking import Asked, TokenBits, make_bits

_HEARTBEAT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Rest:
    """What a restarted request brought."""

    tokens: tuple[TokenBits, ...]
    summary: decode_pb2.SequenceSummary


async def restart_all(
    worker: registry_pb2.WorkerAnnouncement,
    requests: Sequence[Asked],
    outputs: Sequence[Sequence[TokenBits]],
    *,
    num_at_once: int,
) -> list[Rest]:
    """What follows the first tokens of every output: `Asked.num_before_restart` of them become part of the prompt."""
    opened: asyncio.Future[DecodeSession] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(
        run_session(worker, gateway_id="same-tokens", heartbeat_s=_HEARTBEAT_S, on_open=opened.set_result)
    )
    try:
        await asyncio.wait((opened, served), return_when=asyncio.FIRST_COMPLETED)
        if served.done():
            await served
        session = opened.result()

        async def restart(pair: tuple[Asked, Sequence[TokenBits]]) -> Rest:
            return await _restart(session, *pair)

        return await run_all(list(zip(requests, outputs, strict=True)), restart, num_at_once=num_at_once)
    finally:
        served.cancel()
        await asyncio.wait((served,))


async def _restart(session: DecodeSession, asked: Asked, output: Sequence[TokenBits]) -> Rest:
    head = [token.token_id for token in output[: asked.num_before_restart]]
    start = decode_pb2.StartRequest(
        request_id=secrets.token_hex(16),
        sampling=common_pb2.SamplingParams(**asked.sampling),
        credit=asked.max_tokens,
        first_token_index=len(head),
    )
    stream = session.start(start, [*asked.token_ids, *head])
    tokens: list[common_pb2.Token] = []
    try:
        while True:
            event = await stream.next()
            tokens.extend(event.tokens)
            if event.finish_reason:
                break
    finally:
        stream.close()
    assert event.finish_reason == common_pb2.FINISH_REASON_LENGTH, f"a restarted request ended with {event}"
    assert [token.index for token in tokens] == list(range(len(head), asked.max_tokens)), "tokens are missing"
    return Rest(
        tuple(
            make_bits(token.token_id, token.logprob, [(top.token_id, top.logprob) for top in token.top_logprobs])
            for token in tokens
        ),
        event.summary,
    )
