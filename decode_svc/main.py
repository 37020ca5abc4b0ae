"""The decode worker's process. The life of a request is told in `servicer`, that of a hand-off in `handoff`."""

from collections.abc import Sequence

from decode_svc.decision import PrefillPolicy
from decode_svc.peers import Peers
from decode_svc.servicer import DecodeServicer
from decode_svc.source import HandoffSource
from staffetta.config.schema import DecodeConfig
from staffetta.rpc.server import RpcServer
from staffetta.v1 import common_pb2, control_pb2, decode_pb2_grpc, registry_pb2
from worker.lifecycle import Worker, run_worker


class DecodeService:
    """The decode role of a worker; satisfies `worker.lifecycle.Service`."""

    def __init__(self, worker: Worker, config: DecodeConfig) -> None:
        rank = worker.rank
        self._worker = worker
        self._config = config
        self._servicer = DecodeServicer(rank, max_requests=config.max_requests, heartbeat_s=config.heartbeat_s)
        self._source = HandoffSource(
            PrefillPolicy(config.local_prefill, config.local_prefill_max_tokens, config.max_handoff_attempts),
            memory=rank.memory,
            layout=rank.layout,
            timeout_s=config.handoff_timeout_s,
            limit_s=config.handoff_limit_s,
            lease_s=config.lease_s,
            on_first_tokens=self._servicer.on_first_tokens,
            on_prompt_tokens=self._servicer.on_prompt_tokens,
            wake_engine=lambda: rank.engine_thread.wake(),
        )
        self._servicer.use(self._source)
        self._peers: Peers | None = None

    def add_to(self, server: RpcServer) -> None:
        """Adds the servicer."""
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self._servicer, server.grpc)

    def start(self) -> None:
        """Starts the engine and dials the prefill workers of the configuration."""
        rank = self._worker.rank
        rank.start(source=self._source, on_output=self._servicer.on_output, on_failure=self._worker.on_engine_failure)
        self._peers = Peers(
            rank.identity,
            rank.memory,
            transports=self._config.transports,
            static_addresses=self._config.prefill_peers,
            heartbeat_s=self._config.heartbeat_s,
            engine_turns=lambda: rank.engine_thread.num_turns,
            on_change=self._worker.report_now,
        )
        self._source.use(self._peers)

    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._servicer.num_requests()

    def num_sessions(self) -> int:
        """Gateways and prefill workers connected."""
        return self._servicer.num_sessions() + len(self.links())

    def prefills_locally(self) -> bool:
        """As configured."""
        return self._config.local_prefill == "auto"

    def begin_drain(self) -> None:
        """Refuses new requests."""
        self._servicer.begin_drain()

    def cancel_all(self) -> int:
        """Cancels every request."""
        return self._servicer.cancel_all()

    def handoff_counts(self) -> Sequence[control_pb2.HandoffCount]:
        """How hand-offs ended."""
        return self._source.counts()

    def links(self) -> Sequence[registry_pb2.PeerLink]:
        """Working sessions to prefill workers."""
        return self._peers.links() if self._peers is not None else ()

    def on_peers(self, gateway: str, peers: Sequence[registry_pb2.Peer]) -> None:
        """Dials the prefill workers that a gateway names."""
        if self._peers is not None:
            self._peers.set_wanted(gateway, peers)

    async def close(self) -> None:
        """Gives hand-offs up, waits for their reads, ends the sessions."""
        await self._source.close()
        if self._peers is not None:
            await self._peers.close()


def main(config: DecodeConfig) -> int:
    """Runs a decode worker until it is told to stop; returns the exit code."""
    return run_worker(config, common_pb2.WORKER_ROLE_DECODE, lambda worker: DecodeService(worker, config))
