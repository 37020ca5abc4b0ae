"""What `serve` prints once everything works: the block for people, the same facts as JSON. Pure."""

import json
from dataclasses import asdict, dataclass

from cli.plan import WorkerPlan
from cli.relay import Answer, format_bytes
from staffetta.v1 import common_pb2, registry_pb2

_TRANSPORT_NAMES = {"shm": "shared memory", "tcp": "TCP", "loopback": "loopback"}


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker, as it announced itself."""

    name: str
    role: str
    pid: int
    ready_s: float
    threads: int
    cpus: str
    """Those that it keeps to, such as 0-3; empty: any."""
    num_blocks: int
    block_size: int
    pool_bytes: int


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """One decode worker's working link to a prefill worker."""

    prefill_worker: str
    decode_worker: str
    transport: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ReadyFacts:
    """Everything the ready block says."""

    version: str
    backend: str
    model: str
    num_parameters: int
    is_embedded: bool
    workers: tuple[WorkerFacts, ...]
    links: tuple[LinkFacts, ...]
    self_test: Answer
    ready_s: float
    http: str
    grpc: str
    num_cpus: int
    """Those that the workers may use together."""
    cpu_quota: float | None
    """Of their time, in CPUs, what a control group leaves; None: all of it."""


def describe_worker(
    worker: registry_pb2.RegisteredWorker, *, pid: int, ready_s: float, plan: WorkerPlan
) -> WorkerFacts:
    """A worker's facts from its announcement, and what was planned for it."""
    announcement = worker.announcement
    groups = announcement.identity.layout.groups
    return WorkerFacts(
        name=announcement.identity.worker_id,
        role="prefill" if announcement.identity.role == common_pb2.WORKER_ROLE_PREFILL else "decode",
        pid=pid,
        ready_s=round(ready_s, 3),
        threads=plan.config.threads,
        cpus=",".join(plan.config.cpus),
        num_blocks=announcement.num_blocks,
        block_size=groups[0].block_size if groups else 0,
        pool_bytes=announcement.pool_bytes,
    )


def describe_links(worker: registry_pb2.RegisteredWorker) -> list[LinkFacts]:
    """A decode worker's links; none for a prefill worker."""
    name = worker.announcement.identity.worker_id
    return [LinkFacts(link.prefill_worker, name, link.transport, link.bytes_per_s) for link in worker.links]


def ready_block(facts: ReadyFacts) -> str:
    """The block that a terminal shows."""
    embedded = ", embedded" if facts.is_embedded else ""
    parameters = f"{format_count(facts.num_parameters)} parameters{embedded}"
    name_width = max(10, *(len(worker.name) for worker in facts.workers)) + 2
    threads_width = max(len(_threads(worker)) for worker in facts.workers)
    rest = f"http://{facts.http}/v1"
    lines = [f"Staffetta {facts.version} · {facts.backend} · model {facts.model} ({parameters})", ""]
    lines += [
        f"  {worker.name:<{name_width}}pid {worker.pid:<7}ready {worker.ready_s:.1f} s   "
        f"{_threads(worker):<{threads_width}}   "
        f"{worker.num_blocks:>5} KV blocks × {worker.block_size} tokens   {format_bytes(worker.pool_bytes):>8}"
        for worker in facts.workers
    ]
    if facts.cpu_quota is not None and facts.cpu_quota < facts.num_cpus:
        lines.append(f"  {'CPUs':<{name_width}}{facts.cpu_quota:g} of {facts.num_cpus}, by the control group's quota")
    lines += [
        f"  {'hand-off':<{name_width}}{_handoff(facts)}",
        "",
        f'  REST   {rest:<30} OpenAI style, model "{facts.model}"',
        f"  gRPC   {facts.grpc:<30} grpcurl -plaintext {facts.grpc} list",
        "  stop   Ctrl-C (twice: at once)",
    ]
    return "\n".join(lines)


def _threads(worker: WorkerFacts) -> str:
    cpus = f" on CPU {worker.cpus}" if worker.cpus else ""
    return f"{worker.threads:>2} {'thread' if worker.threads == 1 else 'threads'}{cpus}"


def ready_json(facts: ReadyFacts) -> str:
    """The same as one JSON object, on one line."""
    return json.dumps(asdict(facts))


def format_count(number: int) -> str:
    """3.1M, 473M, 7.2B; below a thousand as it is."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return str(number)


def _handoff(facts: ReadyFacts) -> str:
    test = facts.self_test
    took = f"{test.total_s * 1000:.0f} ms"
    if not test.prefill_worker:
        return f"none · self-test on {test.decode_worker} alone in {took}"
    rates: dict[str, list[float]] = {}
    for link in facts.links:
        rates.setdefault(_TRANSPORT_NAMES.get(link.transport, link.transport), []).append(link.bytes_per_s / 1e9)
    transports = ", ".join(f"{name} {_range(values)} GB/s" for name, values in rates.items())
    return f"{transports} · self-test through {test.prefill_worker} → {test.decode_worker} in {took}"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low}–{high}"
