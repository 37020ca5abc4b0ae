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
from staffetta.exits import OperatorError
from staffetta.rpc import logging as rpc_logging

Ends = asyncio.Queue[str | OperatorError]
"""What ends a gateway: words for the log in good order, an error when it cannot go on."""

log = logging.getLogger(__name__)


class Serving(Protocol):
    """What runs until it is told to end: a gateway, whichever its processes."""

    async def start(self) -> GatewayReady:
        """Opens the doors. Raises OperatorError; then, or given up, what is open is closed by `close`."""

    async def drain(self, *, timeout_s: float) -> None:
        """Takes no new requests; returns when those under way have ended, or `timeout_s` later."""

    async def close(self) -> None:
        """Ends what is left. Idempotent."""


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

    ends = Ends()
    serving = Gateway(config, model) if config.workers == 1 else Parent(config, model, on_failure=ends.put_nowait)
    await serve_until_told(serving, ends, drain_s=config.drain_s, on_ready=tell)


async def serve_until_told(
    serving: Serving, ends: Ends, *, drain_s: float, on_ready: Callable[[GatewayReady], None]
) -> None:
    """Serves until something ends it, a signal or what is put into `ends`: the first drains, or gives up a start that
    is not over yet; the second ends at once.

    Raises OperatorError when it cannot start, and the one that has ended it.
    """
    with _signals_into(ends):
        try:
            if (ready := await _start(serving, ends)) is None:
                return
            on_ready(ready)
            end = await ends.get()
            log.info("%s: draining for up to %g s", end.what if isinstance(end, OperatorError) else end, drain_s)
            await _drain(serving, ends, timeout_s=drain_s)
        finally:
            await serving.close()
    if isinstance(end, OperatorError):
        raise end


async def _start(serving: Serving, ends: Ends) -> GatewayReady | None:
    """Opens the doors; None when something ended it before."""
    start = asyncio.create_task(serving.start(), name="start")
    first = asyncio.create_task(ends.get(), name="first-signal")
    await asyncio.wait((start, first), return_when=asyncio.FIRST_COMPLETED)
    if first.done():
        log.info("%s: the start is given up", first.result())
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return None
    first.cancel()
    return start.result()


async def _drain(serving: Serving, ends: Ends, *, timeout_s: float) -> None:
    """Waits for requests under way, until they have ended, the time is up, or it is to end at once."""
    drain = asyncio.create_task(serving.drain(timeout_s=timeout_s), name="drain")
    second = asyncio.create_task(ends.get(), name="second-signal")
    await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
    for task in (drain, second):
        task.cancel()
    await asyncio.gather(drain, second, return_exceptions=True)


@contextlib.contextmanager
def _signals_into(ends: Ends) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT)
    for number in caught:
        loop.add_signal_handler(number, ends.put_nowait, number.name)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
