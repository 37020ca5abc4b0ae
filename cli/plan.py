"""Decides what `staffetta serve` starts: each child's name and complete configuration. Pure.

A setting that serve and a role share: serve's flag, else what is written for that very role, else serve's value. So one
file drives a whole deployment and a flag still overrules it. Addresses and names are serve's own: everything is on this
machine, whatever a file says for other hosts.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from staffetta.address import parse_address
from staffetta.config.load import Loaded
from staffetta.config.origin import OriginKind
from staffetta.config.schema import DecodeConfig, GatewayConfig, PrefillConfig, ServeConfig
from staffetta.cpus import format_cpus, parse_cpus, usable_threads
from staffetta.exits import UsageError

T = TypeVar("T", GatewayConfig, PrefillConfig, DecodeConfig)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the machine and the moment add to the settings."""

    http: str
    """host:port of the REST door, its port chosen."""
    grpc: str
    """host:port of the gRPC door, its port chosen."""
    shm_dir: str
    cluster_key: str
    cpus: tuple[int, ...]
    """Those that this process may use."""
    registry: str = "127.0.0.1:0"
    """host:port where workers register with a gateway of several processes, its port chosen."""
    cpu_quota: float | None = None
    """Of their time, in CPUs, what a control group leaves to all processes together; None: all of it."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker."""

    name: str
    role: str
    config: PrefillConfig | DecodeConfig


@dataclass(frozen=True, slots=True)
class ServePlan:
    """Everything that serve starts."""

    gateway: GatewayConfig
    workers: tuple[WorkerPlan, ...]
    num_cpus: int
    """Those that all may use together."""
    cpu_quota: float | None
    """Of their time, in CPUs, what a control group leaves; None: all of it."""

    @property
    def registry(self) -> str:
        """host:port where workers register, which knows when every gateway process can reach them."""
        return registry_of(self.gateway)

    @property
    def pinned_cpus(self) -> frozenset[int]:
        """Those that workers keep to; empty where none was given any."""
        return frozenset().union(*(parse_cpus(worker.config.cpus) for worker in self.workers))

    @property
    def max_threads(self) -> int:
        """The most threads that any worker computes with."""
        return max(worker.config.threads for worker in self.workers)

    def names(self, role: str) -> tuple[str, ...]:
        """The names of one role's workers."""
        return tuple(worker.name for worker in self.workers if worker.role == role)


def plan_serve(
    serve: Loaded[ServeConfig],
    *,
    gateway: Loaded[GatewayConfig],
    prefill: Loaded[PrefillConfig],
    decode: Loaded[DecodeConfig],
    surroundings: Surroundings,
) -> ServePlan:
    """Plans the children; `gateway`, `prefill` and `decode` are loaded without flags."""
    config = serve.config
    num_cores = usable_threads(len(surroundings.cpus), surroundings.cpu_quota)
    threads = plan_threads(num_cores, num_prefill=config.prefill, num_decode=config.decode)
    log_level = "warning" if serve.origins["log_level"].kind is OriginKind.DEFAULT else config.log_level
    doors: dict[str, Any] = {
        "http": surroundings.http,
        "grpc": surroundings.grpc,
        "workers": num_gateway_processes(serve, gateway),
    }
    if doors["workers"] > 1:
        doors["registry"] = surroundings.registry
    shared: dict[str, Any] = {"cluster_key": surroundings.cluster_key, "log_level": log_level}
    gateway_config = dataclasses.replace(_merge(serve, gateway), **shared, **doors)
    worker: dict[str, Any] = shared | {
        "listen": "127.0.0.1:0",
        "advertise": "",
        "transfer_listen": "127.0.0.1:0",
        "transfer_advertise": "",
        "gateways": (dialable(registry_of(gateway_config)),),
        "shm_dir": surroundings.shm_dir,
    }
    prefill_config = dataclasses.replace(
        _merge(serve, prefill), **worker, failpoints=config.prefill_failpoints or prefill.config.failpoints
    )
    decode_config = dataclasses.replace(
        _merge(serve, decode),
        **worker,
        failpoints=config.decode_failpoints or decode.config.failpoints,
        local_prefill="never" if config.no_local_prefill else decode.config.local_prefill,
    )
    workers = [
        WorkerPlan(
            name,
            role,
            dataclasses.replace(role_config, worker_id=name, threads=role_config.threads or threads[role]),
        )
        for role, count, role_config in (
            ("prefill", config.prefill, prefill_config),
            ("decode", config.decode, decode_config),
        )
        for name in (f"{role}-{number}" for number in range(count))
    ]
    return ServePlan(
        gateway_config,
        pin(workers, surroundings.cpus) if config.pin else tuple(workers),
        num_cpus=len(surroundings.cpus),
        cpu_quota=surroundings.cpu_quota,
    )


def pin(workers: Sequence[WorkerPlan], cpus: Sequence[int]) -> tuple[WorkerPlan, ...]:
    """The workers, each on as many neighbouring CPUs as it has threads. Raises UsageError where there are too few."""
    ends = list(accumulate(worker.config.threads for worker in workers))
    if ends[-1] > len(cpus):
        raise UsageError(
            "TOO_FEW_CPUS",
            f"--pin: the workers compute with {ends[-1]} threads",
            why=f"this process may use {len(cpus)} CPUs",
            fix=f"--threads {max(1, len(cpus) // len(workers))}, fewer workers, or no --pin",
        )
    placed = [format_cpus(cpus[end - worker.config.threads : end]) for worker, end in zip(workers, ends, strict=True)]
    return tuple(
        dataclasses.replace(worker, config=dataclasses.replace(worker.config, cpus=own))
        for worker, own in zip(workers, placed, strict=True)
    )


def plan_threads(num_cores: int, *, num_prefill: int, num_decode: int) -> dict[str, int]:
    """How many threads a worker of each role computes with, unless a setting says so.

    Every worker gets its share of the cores. Where that is a single one, a worker computes on two if its own role
    leaves it two: prefill and decode of one request take turns, and threads that wait sleep. Two cores, one worker of
    each role, 0.5 B parameters in bfloat16, 512 tokens in and 64 out: with two threads each the first token comes after
    0.65 of the time, the others as before. It costs streams that run while another prompt is prefilled: at 1.6 requests
    per second of 128 tokens in and 32 out, 99 % of gaps are within 382 instead of 125 ms.
    """
    share = num_cores // (num_prefill + num_decode)
    return {
        role: max(1, share, min(2, num_cores // max(1, count)))
        for role, count in (("prefill", num_prefill), ("decode", num_decode))
    }


def num_gateway_processes(serve: Loaded[ServeConfig], gateway: Loaded[GatewayConfig]) -> int:
    """How many processes the gateway has: as serve was told, else as the gateway's own settings say."""
    if serve.origins["gateway_workers"].kind is not OriginKind.DEFAULT:
        return serve.config.gateway_workers
    return gateway.config.workers


def registry_of(gateway: GatewayConfig) -> str:
    """host:port where workers register with a gateway: with one process, at its gRPC door."""
    return gateway.grpc if gateway.workers == 1 else gateway.registry


def dialable(address: str) -> str:
    """Where a process of this machine reaches what listens on `address`: loopback for a listener on all interfaces."""
    parsed = parse_address(address)
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared, not bound)
    return str(parsed._replace(host=loopback.get(parsed.host, parsed.host)))


def _merge(serve: Loaded[ServeConfig], role: Loaded[T]) -> T:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(role.config):
        if (origin := serve.origins.get(field.name)) is None:
            continue
        if origin.kind is OriginKind.FLAG or not role.origins[field.name].is_own:
            changes[field.name] = getattr(serve.config, field.name)
    return dataclasses.replace(role.config, **changes)
