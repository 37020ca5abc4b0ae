"""One end of the socket pair between a gateway's parent and a child: protobuf messages, each behind its length.

Nobody else holds the pair, so it has no name, no door and no key, and its end is the end of the process at the other
side, however that ended. Says nothing of what the messages mean. Event loop only.
"""

import asyncio
import socket
import struct
from typing import Final, Generic, Self, TypeVar

from google.protobuf.message import DecodeError, Message

MAX_MESSAGE_BYTES: Final = 16 * 2**20
MAX_UNREAD_BYTES: Final = 64 * 2**20
"""What may wait for the other side to read. A process that far behind is not coming back."""

_LENGTH: Final = struct.Struct("!I")

In = TypeVar("In", bound=Message)
Out = TypeVar("Out", bound=Message)


class LinkError(Exception):
    """The other side broke the order, or does not read. Both sides are ours, so one of us is wrong."""


class Link(Generic[In, Out]):
    """One end: `In` is received, `Out` is sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: type[In]) -> None:
        self._reader = reader
        self._writer = writer
        self._incoming = incoming

    @classmethod
    async def open(cls, own_end: socket.socket, incoming: type[In]) -> Self:
        """The link over `own_end`, which belongs to it from now on."""
        own_end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=own_end)
        return cls(reader, writer, incoming)

    def send(self, message: Out) -> None:
        """Queues a message; never waits. To a process that has ended, nothing: `receive` tells of that.

        Raises LinkError for a message above the bound, and when too much waits to be read.
        """
        if self._writer.is_closing():
            return
        body = message.SerializeToString()
        if len(body) > MAX_MESSAGE_BYTES:
            raise LinkError(f"a message has {len(body)} bytes, the bound is {MAX_MESSAGE_BYTES}")
        if (num_unread := self._writer.transport.get_write_buffer_size()) > MAX_UNREAD_BYTES:
            raise LinkError(f"the other side left {num_unread} bytes unread")
        self._writer.write(_LENGTH.pack(len(body)) + body)

    async def receive(self) -> In | None:
        """The next message; None when the other side has ended. Raises LinkError for what is none."""
        try:
            (num_bytes,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if num_bytes > MAX_MESSAGE_BYTES:
                raise LinkError(f"a message of {num_bytes} bytes is announced, the bound is {MAX_MESSAGE_BYTES}")
            body = await self._reader.readexactly(num_bytes)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        message = self._incoming()
        try:
            message.ParseFromString(body)
        except DecodeError as error:
            raise LinkError(f"{num_bytes} bytes are no {self._incoming.__name__}") from error
        return message

    def close(self) -> None:
        """Ends the link; what waits is dropped. Idempotent."""
        self._writer.transport.abort()
