"""The other ends of the relay bar, a process each: the client, and a server that stands where the gateway would.

`client` reads all streams on one thread, over epoll, and notes when each token arrived: the least that a client in
Python can do. `null` writes to it what a gateway would, step by step, and has no other work; what is measured there is
the time of the sockets and of the client. Both print one JSON document, times in nanoseconds of the monotonic clock.
"""

import argparse
import json
import select
import socket
import sys
import time
from contextlib import ExitStack
from typing import Final

TOKEN_MARK: Final = b'"delta":{"content":'
END_MARK: Final = b"data: [DONE]"
_MAX_READ: Final = 1 << 16
_FRAME: Final = (
    b'data: {"id":"chatcmpl-%032x","object":"chat.completion.chunk","created":1700000000,"model":"demo",'
    b'"system_fingerprint":"numerics","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
    b'"finish_reason":null}]}\n\n' % 0
)
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
    b"x-request-id: %032x\r\n\r\n" % 0
)


def _request(body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: relay\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def read_streams(address: tuple[str, int], *, num_streams: int, num_tokens: int) -> list[list[int]]:
    """Asks for `num_streams` chats of `num_tokens` at once; when each token of each arrived.

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
                # The gateway writes whole frames, far smaller than a segment of the loopback: no mark is ever cut.
                arrivals[number].extend([now] * (data.count(TOKEN_MARK)))
                if END_MARK in data or not data:
                    poll.unregister(number)
                    del sockets[number]
                    if len(arrivals[number]) != num_tokens:
                        raise RuntimeError(
                            f"a stream ended at {len(arrivals[number])} of {num_tokens} tokens: {data[-300:]!r}"
                        )
    return list(arrivals.values())


def write_streams(*, num_streams: int, num_tokens: int, step_s: float) -> list[int]:
    """Serves that client: prints the port, and sends one frame to every stream in each step; when each step began."""
    began: list[int] = []
    frame = b"%x\r\n%b\r\n" % (len(_FRAME), _FRAME)
    last = END_MARK + b"\n\n"
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=num_streams))
        print(server.getsockname()[1], flush=True)
        clients = [stack.enter_context(server.accept()[0]) for _ in range(num_streams)]
        for client in clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.recv(_MAX_READ)
            client.sendall(_HEAD)
        start = time.monotonic()
        for step in range(1, num_tokens + 1):
            time.sleep(max(0.0, start + step * step_s - time.monotonic()))
            began.append(time.monotonic_ns())
            for client in clients:
                client.sendall(frame)
        for client in clients:
            client.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))
    return began


def main() -> int:
    """Plays one part. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("part", choices=("client", "null"))
    parser.add_argument("--address", default="", help="host:port that the client talks to")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.0)
    asked = parser.parse_args()
    if asked.part == "client":
        host, _, port = asked.address.rpartition(":")
        found: object = read_streams((host, int(port)), num_streams=asked.streams, num_tokens=asked.tokens)
    else:
        found = write_streams(num_streams=asked.streams, num_tokens=asked.tokens, step_s=asked.step_s)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
