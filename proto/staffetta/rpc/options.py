"""gRPC options shared by every server and channel: keep-alive that notices a frozen peer within two seconds.

A killed process is noticed at once by its closed socket; a stopped one, or a half-open link, only by pings. All three
options are needed: with keep-alive time and timeout alone a frozen process takes a minute, because the transport's own
ping timeout is what fires. Servers must tolerate the pings they are sent, else they answer with GOAWAY.
"""

MAX_MESSAGE_BYTES = 256 * 1024
"""Bound of every message inside the cluster; what can be larger travels in parts."""

MAX_CLIENT_MESSAGE_BYTES = 4 * 1024 * 1024
"""Bound of a message at the clients' door."""

_KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_CLIENT_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_CLIENT_MESSAGE_BYTES),
    # A worker that restarts on the same port must be found again quickly.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Two channels to one address must not share a connection that one of them is about to lose.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MAX_CLIENT_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_CLIENT_MESSAGE_BYTES),
    # A second server on a taken port is an error, not a silent load balancer.
    ("grpc.so_reuseport", 0),
)

SHARED_PORT_OPTIONS: tuple[tuple[str, int], ...] = (
    *(option for option in SERVER_OPTIONS if option[0] != "grpc.so_reuseport"),
    # For the processes of one server whose parent holds the port against everybody else.
    ("grpc.so_reuseport", 1),
)
