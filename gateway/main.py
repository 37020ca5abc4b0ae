"""The gateway process: both doors and the registry on one event loop. It never imports torch.

A request's life, as queues: 1. the door's socket; 2. the thread pool, for tokenization; 3. the wait for a worker,
bounded in time; 4. its decode session's outbox; 5. its own queue of events, bounded by its credit; 6. the client's
socket.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

import uvloop

from gateway.app import Gateway, GatewayReady
from gateway.model import load_model
from staffetta.config.schema import GatewayConfig
from staffetta.rpc import logging as rpc_logging

log = logging.getLogger(__name__)


def main(config: GatewayConfig, *, on_ready: Callable[[GatewayReady], None] | None = None) -> int:
    """Runs a gateway until SIGTERM or SIGINT has drained it; the exit code. Raises OperatorError."""
    rpc_logging.configure("gateway", config.log_level)
    uvloop.run(serve(config, on_ready=on_ready))
    return 0


async def serve(config: GatewayConfig, *, on_ready: Callable[[GatewayReady], None] | None = None) -> None:
    """Serves until a signal: the first drains, the second ends at once. Raises OperatorError when it cannot start.

    `on_ready` is told the bound addresses once both doors are open; workers may register from then on.
    """
    gateway = Gateway(config, load_model(config))
    signals: asyncio.Queue[str] = asyncio.Queue()
    with _signals_into(signals):
        ready = await gateway.start()
        log.info("model %s, REST on http://%s, gRPC on %s", gateway.journeys.model.name, ready.http, ready.grpc)
        try:
            if on_ready is not None:
                on_ready(ready)
            log.info("%s: draining for up to %g s", await signals.get(), config.drain_s)
            await _drain(gateway, signals, timeout_s=config.drain_s)
        finally:
            await gateway.close()


async def _drain(gateway: Gateway, signals: "asyncio.Queue[str]", *, timeout_s: float) -> None:
    """Waits for requests under way, until they have ended, the time is up, or a second signal comes."""
    drain = asyncio.create_task(gateway.drain(timeout_s=timeout_s), name="drain")
    second = asyncio.create_task(signals.get(), name="second-signal")
    await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
    for task in (drain, second):
        task.cancel()
    await asyncio.gather(drain, second, return_exceptions=True)


@contextlib.contextmanager
def _signals_into(signals: "asyncio.Queue[str]") -> Iterator[None]:
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT)
    for number in caught:
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
