"""The gateway process: both doors and the registry on one event loop, or the parent of several that share the doors.
It never imports torch.

A request's life, as queues: 1. the door's socket; 2. the thread pool, for tokenization; 3. the wait for a worker,
bounded in time; 4. its decode session's outbox; 5. its own queue of events, bounded by its credit; 6. the client's
socket.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Protocol

import uvloop

from gateway.app import Gateway, GatewayReady
from gateway.model import load_model
from gateway.parent import Parent
from staffetta.config.schema import GatewayConfig
from staffetta.rpc import logging as rpc_logging

log = logging.getLogger(__name__)


class Serving(Protocol):
    """What runs until it is told to end: a gateway, whichever its processes."""

    async def start(self) -> GatewayReady:
        """Opens the doors. Raises OperatorError, and then leaves nothing open."""

    async def drain(self, *, timeout_s: float) -> None:
        """Takes no new requests; returns when those under way have ended, or `timeout_s` later."""

    async def close(self) -> None:
        """Ends what is left."""


def main(config: GatewayConfig, *, on_ready: Callable[[GatewayReady], None] | None = None) -> int:
    """Runs a gateway until SIGTERM or SIGINT has drained it; the exit code. Raises OperatorError.

    `on_ready` is told the bound addresses once both doors are open; workers may register from then on.
    """
    rpc_logging.configure("gateway", config.log_level)
    uvloop.run(_serve(config, on_ready))
    return 0


async def _serve(config: GatewayConfig, on_ready: Callable[[GatewayReady], None] | None) -> None:
    model = load_model(config)

    def tell(ready: GatewayReady) -> None:
        if config.workers == 1:
            log.info("model %s, REST on http://%s, gRPC on %s", model.name, ready.http, ready.grpc)
        else:
            log.info(
                "model %s, REST on http://%s, gRPC on %s, registry on %s, %d processes",
                *(model.name, *ready, config.workers),
            )
        if on_ready is not None:
            on_ready(ready)

    serving = Gateway(config, model) if config.workers == 1 else Parent(config, model)
    await serve_until_told(serving, asyncio.Queue(), drain_s=config.drain_s, on_ready=tell)


async def serve_until_told(
    serving: Serving, ends: "asyncio.Queue[str]", *, drain_s: float, on_ready: Callable[[GatewayReady], None]
) -> None:
    """Serves until something ends it, a signal or what is put into `ends`: the first drains, the second ends at once.

    Raises OperatorError when it cannot start.
    """
    with _signals_into(ends):
        ready = await serving.start()
        try:
            on_ready(ready)
            log.info("%s: draining for up to %g s", await ends.get(), drain_s)
            await _drain(serving, ends, timeout_s=drain_s)
        finally:
            await serving.close()


async def _drain(serving: Serving, ends: "asyncio.Queue[str]", *, timeout_s: float) -> None:
    """Waits for requests under way, until they have ended, the time is up, or it is to end at once."""
    drain = asyncio.create_task(serving.drain(timeout_s=timeout_s), name="drain")
    second = asyncio.create_task(ends.get(), name="second-signal")
    await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
    for task in (drain, second):
        task.cancel()
    await asyncio.gather(drain, second, return_exceptions=True)


@contextlib.contextmanager
def _signals_into(ends: "asyncio.Queue[str]") -> Iterator[None]:
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT)
    for number in caught:
        loop.add_signal_handler(number, ends.put_nowait, number.name)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
