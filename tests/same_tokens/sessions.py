"""Runs requests over a decode worker's session, as a gateway does, to restart them and to see what each choice cost.

Clients cannot do this: the position of the first token decides the random numbers, and no door lets it be set or tells
which choice was preempted.
"""

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from gateway.session import DecodeSession, run_session
from staffetta.v1 import common_pb2, decode_pb2, registry_pb2
from tests.bars.concurrent import run_all
from tests.same_tokens.asking import Asked
from tests.same_tokens.bits import AnswerBits, ChoiceBits, TokenBits, make_bits

_HEARTBEAT_S: Final = 5.0
_FINISH_REASONS: Final = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class Start(NamedTuple):
    """A request, or what is left of one of its choices after the tokens `head`, which become part of the prompt."""

    asked: Asked
    choice: int = 0
    head: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.asked}; choice {self.choice} after {len(self.head)}" if self.head else str(self.asked)


class Told(NamedTuple):
    """What the worker answered: the bits, and the summary of each choice."""

    bits: AnswerBits
    summaries: tuple[decode_pb2.SequenceSummary, ...]


async def start_all(
    worker: registry_pb2.WorkerAnnouncement, starts: Sequence[Start], *, num_at_once: int
) -> list[Told]:
    """Runs every request to its end, so many at a time, on one session to `worker`."""
    opened: asyncio.Future[DecodeSession] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(
        run_session(worker, gateway_id="same-tokens", heartbeat_s=_HEARTBEAT_S, on_open=opened.set_result)
    )
    try:
        await asyncio.wait((opened, served), return_when=asyncio.FIRST_COMPLETED)
        if served.done():
            await served
        session = opened.result()

        async def start(one: Start) -> Told:
            return await _start(session, one)

        return await run_all(starts, start, num_at_once=num_at_once)
    finally:
        served.cancel()
        await asyncio.wait((served,))


def restarts(requests: Sequence[Asked], answers: Sequence[AnswerBits]) -> list[tuple[Start, AnswerBits]]:
    """Every choice that has two tokens or more, from somewhere between its first and its last one, and what is due.

    Where the prompt is scored, it is scored again, without the tokens that were generated.
    """
    found = []
    for asked, answer in zip(requests, answers, strict=True):
        for choice, (bits, share) in enumerate(zip(answer.choices, asked.restart_at, strict=True)):
            if len(bits.tokens) > 1:
                at = 1 + int(share * (len(bits.tokens) - 1))
                head = bits.tokens[:at]
                rest = AnswerBits(answer.prompt, (ChoiceBits(bits.tokens[at:], bits.finish_reason),))
                found.append((Start(asked, choice, tuple(token.token_id for token in head)), rest))
    return found


async def _start(session: DecodeSession, one: Start) -> Told:
    start = decode_pb2.StartRequest(
        request_id=secrets.token_hex(16),
        sampling=common_pb2.SamplingParams(**_sampling(one)),
        credit=one.asked.sampling["max_tokens"],
        first_token_index=len(one.head),
        choice_index=one.choice,
    )
    num_choices = 1 if one.head else one.asked.num_choices
    stream = session.start(start, [*one.asked.token_ids, *one.head])
    prompt: list[common_pb2.Token] = []
    tokens: defaultdict[int, list[common_pb2.Token]] = defaultdict(list)
    ends: dict[int, decode_pb2.SequenceEvent] = {}
    try:
        while len(ends) < num_choices:
            event = await stream.next()
            prompt.extend(event.prompt_tokens)
            tokens[event.choice_index].extend(event.tokens)
            if event.finish_reason:
                ends[event.choice_index] = event
    finally:
        stream.close()
    choices = sorted(ends)
    for choice in choices:
        indices = [token.index for token in tokens[choice]]
        assert indices == list(range(len(one.head), len(one.head) + len(indices))), f"tokens are missing: {indices}"
    assert [token.index for token in prompt] == list(range(1, 1 + len(prompt))), "scores are missing"
    bits = tuple(
        ChoiceBits(_bits_of(tokens[choice]), _FINISH_REASONS[ends[choice].finish_reason]) for choice in choices
    )
    return Told(AnswerBits(_bits_of(prompt), bits), tuple(ends[choice].summary for choice in choices))


def _sampling(one: Start) -> dict[str, Any]:
    """What goes on after a restart is one choice."""
    return dict(one.asked.sampling) | ({"n": 1} if one.head else {})


def _bits_of(tokens: Sequence[common_pb2.Token]) -> tuple[TokenBits, ...]:
    return tuple(
        make_bits(token.token_id, token.logprob, [(top.token_id, top.logprob) for top in token.top_logprobs])
        for token in tokens
    )
