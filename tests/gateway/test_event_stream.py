"""One response as a stream of events: when its comments come, and when they must not."""

from starlette.types import Message

from gateway.event_stream import EventStream
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
    async with stream.kept_alive():
        assert sent == []
        await stream.write(b"data: 1\n\n")
        await eventually(lambda: len(num_sent_when_asked) > 3)
    assert num_sent_when_asked[:4] == [2, 2, 2, 3]
    assert [message["body"] for message in sent[1:]] == [b"data: 1\n\n", COMMENT]
    assert (b"staffetta-decode-worker", b"decode-7") in sent[0]["headers"]
