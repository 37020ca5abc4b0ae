"""Text that is written as it comes, without a task switch: the same bytes, the same order, the same limits."""

import asyncio
import re
import socket
from typing import Any

import pytest

from gateway import body_writer, generate_http, session
from gateway.body_writer import BodyWriter
from staffetta.v1 import common_pb2, decode_pb2
from tests.gateway.fakes import make_token
from tests.gateway.running import Running, asynchronous, eventually, ids_of, play, running

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 60}
TEXT = 'one "two"\n three ☃ four — fünf \U0001f980 six'
NUM_TOKENS = 30_000
"""More in bytes than the kernel takes for a connection whose client does not read."""
VARIABLE = re.compile(r'"(id|created|seed|gateway_s)":[^,}]*')


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written at once."""
    chunks: list[bytes] = []
    write = BodyWriter.write

    def note(self: BodyWriter, data: bytes) -> None:
        chunks.append(data)
        write(self, data)

    monkeypatch.setattr(BodyWriter, "write", note)
    return chunks


async def answered(it: Running, body: dict[str, Any]) -> str:
    response = await it.http.post(CHAT, json=body)
    assert response.status_code == 200
    return VARIABLE.sub(r'"\1":0', response.text)


@pytest.mark.parametrize(
    ("asked", "is_at_once"),
    [
        ({}, True),
        ({"n": 3}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"max_tokens": 3}, True),
        ({"logprobs": True}, False),
        ({"return_token_ids": True}, False),
        ({"stop": "six"}, False),
    ],
)
@asynchronous
async def test_a_stream_is_the_same_bytes_however_it_is_written(
    asked: dict[str, Any], is_at_once: bool, written: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(reply=ids_of(TEXT)) as it:
        play(it.worker, TEXT, "two", "three of them")
        at_once = await answered(it, BODY | asked)
        assert bool(written) == is_at_once
        written.clear()
        monkeypatch.setattr(generate_http, "body_writer_of", lambda scope: None)
        event_by_event = await answered(it, BODY | asked)
        assert written == []
    # Choices take turns, and which comes first in a turn is the event loop's: each choice's own chunks are in order.
    for index in range(3):
        assert chunks_of(at_once, index) == chunks_of(event_by_event, index)
    assert sorted(at_once.splitlines()) == sorted(event_by_event.splitlines())


def chunks_of(answer: str, index: int) -> list[str]:
    return [line for line in answer.splitlines() if f'"index":{index}' in line]


@asynchronous
async def test_tokens_that_come_twice_are_sent_once_and_a_gap_ends_the_request(written: list[bytes]) -> None:
    ids = ids_of(" the and of")
    async with running(reply=None) as it:
        answer = asyncio.create_task(it.http.post(CHAT, json=BODY))
        request_id = (await it.worker.starts.get()).request_id
        it.worker.emit(request_id, ids[:1])
        await eventually(lambda: it.num_in_flight() > 0)
        it.worker.emit(request_id, ids[:1])
        it.worker.emit(request_id, ids[1:2], at=1)
        it.worker.emit(request_id, ids[:2])
        it.worker.emit(request_id, ids[2:], at=3)
        text = (await answer).text
    assert [match for match in re.findall(r'"content":"([^"]*)"', text) if match] == [" the", " and"]
    assert written == [chunk for chunk in written if b'" and"' in chunk]
    assert '"error":' in text
    assert "[DONE]" not in text


@asynchronous
async def test_a_client_that_does_not_read_gets_no_more_than_the_transport_holds(written: list[bytes]) -> None:
    (token_id,) = ids_of(" and")
    async with running(reply=None, credit_tokens=64, max_requests=4) as it:
        host, _, port = it.http_address.rpartition(":")
        body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 2000}'
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (host, int(port)))
            head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body))
            await loop.sock_sendall(client, head + body)
            request_id = (await it.worker.starts.get()).request_id
            # A worker that minds no credit: what is not written waits in the request's own queue.
            for first in range(0, NUM_TOKENS, 1000):
                events = [
                    decode_pb2.SequenceEvent(request_id=request_id, tokens=[make_token(at, token_id)])
                    for at in range(first, first + 1000)
                ]
                it.worker.send_step(events)
            (stream,) = next(iter(it.gateway.workers)).session._streams.values()  # type: ignore[union-attr]
            # All have come; a few went the other way, between a pause of the transport and the next.
            await eventually(lambda: len(stream._events) + len(written) > NUM_TOKENS - 500)
            num_written = len(written)
            assert 0 < num_written < NUM_TOKENS - 2_000
            assert it.worker.credit[request_id, 0] <= num_written + 2 * 64
            it.worker.emit(request_id, (), finish=common_pb2.FINISH_REASON_LENGTH)
            received = bytearray()
            while b"[DONE]" not in received[-100:]:
                received += await loop.sock_recv(client, 1 << 20)
    assert received.count(b'"content":" and"') == NUM_TOKENS


@asynchronous
async def test_a_failure_of_one_write_ends_its_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = ids_of("one two three")
    write = BodyWriter.write
    failing: list[BodyWriter] = []

    def fail_first(self: BodyWriter, data: bytes) -> None:
        failing.append(self)
        if self is failing[0]:
            raise RuntimeError("the transport broke")
        write(self, data)

    monkeypatch.setattr(BodyWriter, "write", fail_first)
    async with running(reply=None) as it:
        answers = [asyncio.create_task(it.http.post(CHAT, json=BODY)) for _ in range(2)]
        requests = [(await it.worker.starts.get()).request_id for _ in answers]
        for at, token_id in enumerate(ids):
            for request_id in requests:
                it.worker.emit(request_id, [token_id], at=at)
        for request_id in requests:
            it.worker.emit(request_id, (), finish=common_pb2.FINISH_REASON_LENGTH)
        texts = sorted([(await answer).text for answer in answers], key=len)
    assert "the request failed here" in texts[0]
    assert "the transport broke" not in texts[0]
    assert "[DONE]" not in texts[0]
    assert "".join(re.findall(r'"content":"([^"]*)"', texts[1])) == "one two three"
    assert "[DONE]" in texts[1]
    assert sum("could not be taken" in message for message in caplog.messages) == 1


@asynchronous
async def test_a_long_step_leaves_while_it_is_still_being_delivered() -> None:
    async def unused(*_: object) -> None:
        raise NotImplementedError

    delivered: list[object] = []
    turns: list[int] = []
    it = session.DecodeSession(session.Pipe(unused, unused, heartbeat_s=1), "decode-0")
    stream = it.start(decode_pb2.StartRequest(request_id="x"), [1])
    stream.put = delivered.append  # type: ignore[method-assign,assignment]
    events = [decode_pb2.SequenceEvent(request_id="x") for _ in range(2 * session.EVENTS_AT_ONCE + 1)]
    delivery = asyncio.create_task(it._deliver(events))
    while not delivery.done():
        await asyncio.sleep(0)
        turns.append(len(delivered))
    assert delivered == events
    assert turns[:2] == [session.EVENTS_AT_ONCE, 2 * session.EVENTS_AT_ONCE]


def test_another_server_has_no_writer() -> None:
    assert body_writer.body_writer_of({"type": "http"}) is None
    assert body_writer.body_writer_of({"type": "http", "extensions": {"staffetta.body_writer": "x"}}) is None


@asynchronous
async def test_an_event_is_offered_at_once_only_while_the_reader_waits_for_it() -> None:
    async def unused(*_: object) -> None:
        raise NotImplementedError

    offered: list[int] = []

    def take(event: decode_pb2.SequenceEvent) -> bool:
        offered.append(event.tokens[0].index)
        return True

    it = session.DecodeSession(session.Pipe(unused, unused, heartbeat_s=1), "decode-0")
    stream = it.start(decode_pb2.StartRequest(request_id="x"), [1])
    stream.take_at_once(take)
    events = [decode_pb2.SequenceEvent(request_id="x", tokens=[make_token(index, 5)]) for index in range(6)]
    stream.put(events[0])  # nobody waits yet
    assert await stream.next() == events[0]
    stream.put(events[1])  # the reader does something with the one before
    assert await stream.next() == events[1]
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    stream.put(events[2])
    stream.put(events[3])
    assert offered == [2, 3]
    last = decode_pb2.SequenceEvent(request_id="x", finish_reason=common_pb2.FINISH_REASON_LENGTH)
    stream.put(last)  # an ending is never taken at once
    stream.put(events[4])  # and what comes after it waits its turn
    assert await waiting == last
    assert await stream.next() == events[4]
    assert offered == [2, 3]
