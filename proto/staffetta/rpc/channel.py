"""Channels to peers. Plaintext; loopback or a private network until mutual TLS is configured."""

import grpc.aio

from staffetta.rpc.options import CHANNEL_OPTIONS


def open_channel(address: str) -> grpc.aio.Channel:
    """Opens a channel to `address` (host:port). The caller closes it."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
