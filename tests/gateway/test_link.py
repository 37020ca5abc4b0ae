"""The link between a gateway's parent and a child: messages whole and in order, an end, bounds, no way to break it."""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import link as link_module
from gateway.link import MAX_MESSAGE_BYTES, Link, LinkError
from staffetta.v1 import gateway_pb2
from tests.gateway.running import asynchronous


async def make_ends() -> tuple[Link[Any, Any], Link[Any, Any]]:
    """A parent's end, and its child's."""
    ours, theirs = socket.socketpair()
    parent: Link[Any, Any] = await Link.open(ours, gateway_pb2.ChildMessage)
    child: Link[Any, Any] = await Link.open(theirs, gateway_pb2.ParentMessage)
    return parent, child


async def received(data: bytes) -> list[gateway_pb2.ChildMessage]:
    """What a parent makes of a child that writes `data` and ends. Raises LinkError."""
    ours, theirs = socket.socketpair()
    parent: Link[gateway_pb2.ChildMessage, Any] = await Link.open(ours, gateway_pb2.ChildMessage)
    theirs.sendall(data)
    theirs.close()
    messages: list[gateway_pb2.ChildMessage] = []
    try:
        while (message := await parent.receive()) is not None:
            messages.append(message)
    finally:
        parent.close()
    return messages


def framed(message: gateway_pb2.ChildMessage) -> bytes:
    body = message.SerializeToString()
    return struct.pack("!I", len(body)) + body


@asynchronous
async def test_messages_arrive_whole_in_order_and_the_end_of_a_process_is_the_end_of_its_link() -> None:
    parent, child = await make_ends()
    sent = [gateway_pb2.ParentMessage(left="x" * size) for size in (0, 1, 70_000, 3_000_000)]
    for message in sent:
        parent.send(message)
    assert [await child.receive() for _ in sent] == sent
    child.close()
    assert await parent.receive() is None
    parent.close()
    parent.send(sent[0])  # to nobody


@asynchronous
async def test_a_message_above_the_bound_is_refused_on_either_side() -> None:
    parent, child = await make_ends()
    with pytest.raises(LinkError, match="the bound is"):
        parent.send(gateway_pb2.ParentMessage(left="x" * MAX_MESSAGE_BYTES))
    parent.close()
    child.close()
    with pytest.raises(LinkError, match="is announced"):
        await received(struct.pack("!I", MAX_MESSAGE_BYTES + 1))


@asynchronous
async def test_a_side_that_never_reads_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_UNREAD_BYTES", 1_000_000)
    ours, theirs = socket.socketpair()
    with theirs:
        parent: Link[Any, Any] = await Link.open(ours, gateway_pb2.ChildMessage)
        with pytest.raises(LinkError, match="unread"):
            for _ in range(100):
                parent.send(gateway_pb2.ParentMessage(left="x" * 100_000))
        parent.close()


@given(data=st.binary(max_size=64), whole=st.lists(st.integers(0, 2**32), max_size=3), cut=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_whatever_bytes_come_they_are_messages_or_an_end_or_a_link_error(
    data: bytes, whole: Sequence[int], cut: int
) -> None:
    messages = [gateway_pb2.ChildMessage(scrape=gateway_pb2.PullMetrics(number=number)) for number in whole]
    good = b"".join(map(framed, messages))
    assert asyncio.run(received(good[: len(good) - cut])) == messages[: len(messages) - bool(cut and messages)]
    try:
        asyncio.run(received(good + data))
    except LinkError:
        assert data
