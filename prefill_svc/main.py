"""The prefill worker's process. The life of a request is told in `servicer`."""

import asyncio
from collections.abc import Sequence

from prefill_svc.announcing import Announcer
from prefill_svc.servicer import PrefillServicer
from staffetta.config.schema import PrefillConfig
from staffetta.rpc.server import RpcServer
from staffetta.v1 import common_pb2, control_pb2, prefill_pb2_grpc, registry_pb2
from worker.lifecycle import Worker, run_worker
from worker.rank import open_exporters


class PrefillService:
    """The prefill role of a worker; satisfies `worker.lifecycle.Service`."""

    def __init__(self, worker: Worker, config: PrefillConfig) -> None:
        self._worker = worker
        self._exporters = open_exporters(worker.rank)
        self._announcer = Announcer(worker.rank)
        self._servicer = PrefillServicer(
            worker.rank,
            self._announcer,
            self._exporters,
            max_requests=config.max_requests,
            heartbeat_s=config.heartbeat_s,
        )
        self._sweeping: asyncio.Task[None] | None = None

    def add_to(self, server: RpcServer) -> None:
        """Adds the servicer."""
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self._servicer, server.grpc)

    def start(self) -> None:
        """Starts the engine and the lease sweep."""
        self._worker.rank.start(
            source=None, on_output=self._announcer.on_output, on_failure=self._worker.on_engine_failure
        )
        self._sweeping = asyncio.create_task(self._announcer.sweep_leases(), name="lease-sweep")

    def num_requests(self) -> int:
        """Hand-offs that have not ended."""
        return self._announcer.num_handoffs()

    def num_sessions(self) -> int:
        """Decode workers connected."""
        return self._servicer.num_sessions()

    def prefills_locally(self) -> bool:
        """It has no requests of its own."""
        return False

    def begin_drain(self) -> None:
        """Refuses new hand-offs."""
        self._servicer.begin_drain()

    def cancel_all(self) -> int:
        """Fails every hand-off; the decode workers go on without."""
        return self._servicer.cancel_all()

    def handoff_counts(self) -> Sequence[control_pb2.HandoffCount]:
        """Counted by the decode workers."""
        return ()

    def links(self) -> Sequence[registry_pb2.PeerLink]:
        """Reported by the decode workers."""
        return ()

    def on_peers(self, gateway: str, peers: Sequence[registry_pb2.Peer]) -> None:
        """A prefill worker dials nobody."""

    async def close(self) -> None:
        """Ends the sweep, the checksum thread and the exporters."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.to_thread(self._announcer.close)
        for exporter in self._exporters:
            await asyncio.to_thread(exporter.close)


def main(config: PrefillConfig) -> int:
    """Runs a prefill worker until it is told to stop; returns the exit code."""
    return run_worker(config, common_pb2.WORKER_ROLE_PREFILL, lambda worker: PrefillService(worker, config))
