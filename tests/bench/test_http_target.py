"""The HTTP client of the load generator: what it asks, what it counts as output, and what no figure may come of."""

import asyncio
import json
from collections.abc import Sequence

import pytest

from bench.http_target import HttpTarget
from bench.record import Record
from bench.target import TargetError
from tests.bench.fake_sse import DONE, FakeServer, event, running, usage
from tests.loop import run


async def complete(fake: FakeServer, output_tokens: int, times: int = 1) -> list[Record]:
    target = HttpTarget("fake", "127.0.0.1", fake.port)
    try:
        await target.open()
        answers = [await target.complete((5, 7), output_tokens, due_s=0.0) for _ in range(times)]
        return [answer.record() for answer in answers]
    finally:
        await target.close()


def ask(fake: FakeServer, output_tokens: int = 2, times: int = 1) -> list[Record]:
    async def work() -> list[Record]:
        async with running(fake):
            async with asyncio.timeout(10):
                return await complete(fake, output_tokens, times)

    return run(work())


def test_a_request_is_greedy_ignores_the_end_and_carries_token_ids() -> None:
    fake = FakeServer([event("a"), event("b"), usage(2), DONE])
    ask(fake)
    assert json.loads(fake.bodies[1]) == {
        "model": "served",
        "prompt": [5, 7],
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_every_event_with_text_is_an_arrival_and_the_usage_counts() -> None:
    # The second event holds two tokens; the empty one and the usage hold none.
    (record,) = ask(FakeServer([event("a"), event("bc"), event(""), usage(3), DONE]), 3)
    assert (len(record.arrivals), record.output_tokens) == (2, 3)
    assert record.arrivals[0] <= record.arrivals[1]


@pytest.mark.parametrize(
    "body",
    [
        [event("a") + event("b") + usage(2) + DONE],
        [event("a")[:9], event("a")[9:] + event("b")[:1], event("b")[1:], usage(2), DONE],
        [part.replace(b"\n", b"\r\n") for part in (event("a"), event("b"), usage(2), DONE)],
        [b": still here\n\n", event("a"), event("b"), b"event: end\n\n", usage(2), DONE],
    ],
    ids=["together", "in pieces", "with carriage returns", "with comments"],
)
def test_events_are_found_however_they_are_cut(body: Sequence[bytes]) -> None:
    (record,) = ask(FakeServer(body))
    assert len(record.arrivals) == 2


def test_a_server_that_does_not_count_is_believed() -> None:
    (record,) = ask(FakeServer([event("a"), event("b"), DONE]))
    assert record.output_tokens == 2


@pytest.mark.parametrize(("keeps_alive", "connections"), [(True, 2), (False, 4)])
def test_connections_are_used_again_where_the_server_keeps_them(keeps_alive: bool, connections: int) -> None:
    fake = FakeServer([event("a"), event("b"), usage(2), DONE], keeps_alive=keeps_alive)
    assert len(ask(fake, times=3)) == 3
    assert fake.num_connections == connections


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeServer([b'{"error": "no"}'], status="429 Too Many"), 'fake answered 429: b\'{"error": "no"}\''),
        (FakeServer([event("a"), usage(1), DONE]), "fake sent 1 tokens in 1 events, asked for 2"),
        (FakeServer([usage(2), DONE]), "fake sent 2 tokens in 0 events"),
        (FakeServer([event("a"), b'data: {"error":{"message":"lost"}}\n\n']), "fake broke off: {'message': 'lost'}"),
        (FakeServer(None), "the connection was closed|the connection was lost"),
        (FakeServer(models=b"{}"), "fake lists no model"),
    ],
    ids=["refused", "too few", "no text", "error event", "cut off", "no model"],
)
def test_no_figure_comes_of_an_answer_that_is_not_what_was_asked_for(fake: FakeServer, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        ask(fake)


def test_what_is_not_http_is_told() -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-server\r\n\r\n")
        await writer.drain()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(garbage, "127.0.0.1", 0)
        async with server:
            await HttpTarget("fake", "127.0.0.1", server.sockets[0].getsockname()[1]).open()

    with pytest.raises(TargetError, match="not HTTP"):
        run(work())


def test_nobody_there_is_told() -> None:
    with pytest.raises(TargetError, match=r"fake cannot be reached at 127\.0\.0\.1:1"):
        run(HttpTarget("fake", "127.0.0.1", 1).open())
