"""One response as a stream of events: when its comments come, when they must not, and when its client is given up."""

import asyncio

import pytest
from starlette.types import Message

from gateway.event_stream import ClientGoneError, EventStream
from gateway.request import Placed
from tests.gateway.running import asynchronous, eventually

COMMENT = b": keep-alive\n\n"


@asynchronous
async def test_no_comment_pretends_that_an_engine_that_stands_still_advances() -> None:
    sent: list[Message] = []
    answers = [True, True, False]
    num_sent_when_asked: list[int] = []

    async def send(message: Message) -> None:
        sent.append(message)

    def is_stalled() -> bool:
        num_sent_when_asked.append(len(sent))
        return answers.pop(0) if answers else True

    stream = EventStream(send, {}, keep_alive_s=0.001)
    stream.place(Placed("decode-7", "numerics", is_stalled))
    async with stream.watched():
        assert sent == []
        await stream.write(b"data: 1\n\n")
        await eventually(lambda: len(num_sent_when_asked) > 3)
    assert num_sent_when_asked[:4] == [2, 2, 2, 3]
    assert [message["body"] for message in sent[1:]] == [b"data: 1\n\n", COMMENT]
    assert (b"staffetta-decode-worker", b"decode-7") in sent[0]["headers"]


class Client:
    """Takes the head and `num_bodies` bodies, then nothing more."""

    def __init__(self, *, num_bodies: int) -> None:
        self.num_left = 1 + num_bodies
        self.sent: list[bytes] = []
        self.was_cancelled = False

    async def send(self, message: Message) -> None:
        if self.num_left == 0:
            try:
                await asyncio.Event().wait()
            finally:
                self.was_cancelled = True
        self.num_left -= 1
        self.sent.append(message.get("body", b""))


@pytest.mark.parametrize("num_bodies", [0, 2])
@asynchronous
async def test_a_client_that_leaves_a_write_unread_is_given_up(num_bodies: int) -> None:
    client = Client(num_bodies=num_bodies)
    stream = EventStream(client.send, {}, keep_alive_s=60, write_timeout_s=0.02)
    with pytest.raises(ClientGoneError):
        async with stream.watched():
            for _ in range(3):
                await stream.write(b"data: 1\n\n")
    assert client.sent == [b"", *[b"data: 1\n\n"] * num_bodies]
    assert client.was_cancelled


@asynchronous
async def test_a_write_that_begins_while_nobody_is_due_to_look_is_watched_too() -> None:
    client = Client(num_bodies=1)
    stream = EventStream(client.send, {}, keep_alive_s=60, write_timeout_s=0.02)
    with pytest.raises(ClientGoneError):
        async with stream.watched():
            await stream.write(b"data: 1\n\n")
            for _ in range(5):
                await asyncio.sleep(0)
            await stream.write(b"data: 2\n\n")
    assert client.was_cancelled


@asynchronous
async def test_a_client_that_leaves_a_comment_unread_is_given_up() -> None:
    client = Client(num_bodies=1)
    stream = EventStream(client.send, {}, keep_alive_s=0.001, write_timeout_s=0.02)
    with pytest.raises(ClientGoneError):
        async with stream.watched():
            await stream.write(b"data: 1\n\n")
            await asyncio.Event().wait()
    assert client.was_cancelled


@asynchronous
async def test_a_client_that_leaves_the_end_unread_is_given_up() -> None:
    client = Client(num_bodies=1)
    stream = EventStream(client.send, {}, keep_alive_s=60, write_timeout_s=0.02)
    with pytest.raises(ClientGoneError):
        async with stream.watched():
            await stream.write(b"data: 1\n\n")
            await stream.end()
    assert client.was_cancelled


@asynchronous
async def test_a_stream_that_lasts_longer_than_a_write_may_is_not_given_up() -> None:
    client = Client(num_bodies=100)
    stream = EventStream(client.send, {}, keep_alive_s=60, write_timeout_s=0.01)
    end = asyncio.get_running_loop().time() + 0.05
    async with stream.watched():
        while asyncio.get_running_loop().time() < end:
            await stream.write(b"data: 1\n\n")
            await asyncio.sleep(0.002)
        await stream.end()
    assert client.sent[-1] == b""


@asynchronous
async def test_a_timeout_of_the_block_itself_is_not_the_clients() -> None:
    stream = EventStream(Client(num_bodies=1).send, {}, keep_alive_s=60)
    with pytest.raises(TimeoutError, match="another"):
        async with stream.watched():
            raise TimeoutError("another")


@asynchronous
async def test_no_comment_follows_the_end() -> None:
    client = Client(num_bodies=100)
    stream = EventStream(client.send, {}, keep_alive_s=0.0)
    async with stream.watched():
        await stream.write(b"data: 1\n\n")
        await stream.end()
        num_sent = len(client.sent)
        for _ in range(10):
            await asyncio.sleep(0)
    assert len(client.sent) == num_sent
