"""The other ends of the relay bar, a process each: the client, and servers that stand where the gateway would.

`client` reads all streams on one thread, over epoll, and notes when each token arrived: the least that a client in
Python can do. `null` writes to it what a gateway would, step by step, through plain sockets, and `transport` through
uvloop's transports, as the gateway does; neither has other work. What is measured there is the time of the sockets and
of the client. Each prints one JSON document, times in nanoseconds of the monotonic clock.

Streams come in groups, one for each decode worker: their steps are equally long and begin one after the other.
"""

import argparse
import asyncio
import json
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

import uvloop

TOKEN_MARK: Final = b'"delta":{"content":'
END_MARK: Final = b"data: [DONE]"
_WORKER: Final = re.compile(rb"staffetta-decode-worker: decode-([0-9]+)\r\n")
_MAX_READ: Final = 1 << 16
_FRAME: Final = (
    b'data: {"id":"chatcmpl-%032x","object":"chat.completion.chunk","created":1700000000,"model":"demo",'
    b'"system_fingerprint":"numerics","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
    b'"finish_reason":null}]}\n\n' % 0
)
_CHUNK: Final = b"%x\r\n%b\r\n" % (len(_FRAME), _FRAME)
_LAST: Final = b"%x\r\n%b\n\n\r\n0\r\n\r\n" % (len(END_MARK) + 2, END_MARK)

Write = Callable[[bytes], object]


def _head(group: int) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
        b"x-request-id: %032x\r\nstaffetta-decode-worker: decode-%d\r\n\r\n" % (0, group)
    )


def _request(body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: relay\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def read_streams(address: tuple[str, int], *, num_streams: int, num_tokens: int) -> list[tuple[int, list[int]]]:
    """Asks for `num_streams` chats of `num_tokens` at once; each one's group, and when each of its tokens arrived.

    Raises RuntimeError for a connection that ended, or a stream that lacks tokens at its end.
    """
    body = json.dumps(
        {
            "model": "",
            "stream": True,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": "hello"}],
        }
    ).encode()
    arrivals: dict[int, list[int]] = {}
    groups: dict[int, int] = {}
    sockets: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        for _ in range(num_streams):
            one = stack.enter_context(socket.create_connection(address))
            one.sendall(_request(body))
            one.setblocking(False)
            poll.register(one.fileno(), select.EPOLLIN)
            sockets[one.fileno()] = one
            arrivals[one.fileno()] = []
        while sockets:
            for number, _ in poll.poll():
                data = sockets[number].recv(_MAX_READ)
                now = time.monotonic_ns()
                if number not in groups and (found := _WORKER.search(data)):
                    groups[number] = int(found[1])
                # The gateway writes whole frames, far smaller than a segment of the loopback: no mark is ever cut.
                arrivals[number].extend([now] * (data.count(TOKEN_MARK)))
                if END_MARK in data or not data:
                    poll.unregister(number)
                    del sockets[number]
                    if len(arrivals[number]) != num_tokens:
                        raise RuntimeError(
                            f"a stream ended at {len(arrivals[number])} of {num_tokens} tokens: {data[-300:]!r}"
                        )
    return [(groups[number], arrived) for number, arrived in arrivals.items()]


async def write_steps(groups: Sequence[Sequence[Write]], *, num_tokens: int, step_s: float) -> list[list[int]]:
    """Writes one frame to every stream in each step, then the end; when each group's steps began."""
    began: list[list[int]] = [[] for _ in groups]
    start = time.monotonic()
    for step in range(1, num_tokens + 1):
        for number, writes in enumerate(groups):
            due = start + (step + number / len(groups)) * step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            began[number].append(time.monotonic_ns())
            for write in writes:
                write(_CHUNK)
    for writes in groups:
        for write in writes:
            write(_LAST)
    return began


async def serve(part: str, *, num_streams: int, num_groups: int, num_tokens: int, step_s: float) -> dict[str, object]:
    """Serves that client: prints the port, and writes all streams; when steps began, and the processor time it took."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=num_streams))
        print(server.getsockname()[1], flush=True)
        clients = [stack.enter_context(server.accept()[0]) for _ in range(num_streams)]
        writes: list[Write] = []
        for index, client in enumerate(clients):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.recv(_MAX_READ)
            client.sendall(_head(index % num_groups))
            if part == "transport":
                transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=client)
                stack.callback(transport.close)
                writes.append(transport.write)
            else:
                writes.append(client.sendall)
        groups = [writes[first::num_groups] for first in range(num_groups)]
        before = time.process_time()
        began = await write_steps(groups, num_tokens=num_tokens, step_s=step_s)
        await asyncio.sleep(step_s)  # transports write at the loop's next turn
        return {"began": began, "cpu_s": time.process_time() - before}


def main() -> int:
    """Plays one part. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("part", choices=("client", "null", "transport"))
    parser.add_argument("--address", default="", help="host:port that the client talks to")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.0)
    asked = parser.parse_args()
    found: object
    if asked.part == "client":
        host, _, port = asked.address.rpartition(":")
        found = read_streams((host, int(port)), num_streams=asked.streams, num_tokens=asked.tokens)
    else:
        found = uvloop.run(
            serve(
                asked.part,
                num_streams=asked.streams,
                num_groups=asked.groups,
                num_tokens=asked.tokens,
                step_s=asked.step_s,
            )
        )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
