"""One rank of a worker: weights, KV pool, engine thread, exporters; built from a configuration, taken down in order.

The pool's memory outlives everything that touches it: exporters and readers are closed, then the engine stops, then the
memory goes.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import demo
from engine.cache.source import KVSource
from engine.engine import Engine, EngineLimits
from engine.model_config import ModelConfig, resolve_dtype
from engine.request import StepOutput
from engine.runner import BackendUnavailableError, ModelRunner, load_runner
from engine.thread import EngineThread
from kvtransfer.layout import KVLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.ticket import TicketBook
from kvtransfer.transport import KVExporter, export
from staffetta.cache_dir import open_cache
from staffetta.config.schema import WorkerConfig
from staffetta.control_groups import cpu_quota
from staffetta.cpus import format_cpus, parse_cpus, usable_threads
from staffetta.digest_memo import remembered_digest
from staffetta.exits import UsageError
from staffetta.hashing import BlockHasher, key_fingerprint
from staffetta.v1 import common_pb2
from staffetta.validate import Limits
from worker.codec import layout_to_proto
from worker.fitting import check_memory, weight_bytes
from worker.headroom import headroom
from worker.pool_pages import PoolPages

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Rank:
    """Everything of a worker that is not network. Built by `load_rank`; `start` makes the engine run."""

    config: WorkerConfig
    identity: common_pb2.WorkerIdentity
    layout: KVLayout
    memory: PoolMemory
    num_blocks: int
    runner: ModelRunner
    request_limits: Limits
    """The model's bounds as the validator wants them; the context is also bounded by the pool."""
    eos_token_ids: tuple[int, ...]
    cluster_key: bytes
    tickets: TicketBook
    _engine_thread: EngineThread | None = None
    _pages: PoolPages | None = None
    _private_dir: "tempfile.TemporaryDirectory[str] | None" = None

    @property
    def engine_thread(self) -> EngineThread:
        """The way to the engine."""
        assert self._engine_thread is not None, "start() comes first"
        return self._engine_thread

    def start(
        self,
        *,
        source: KVSource | None,
        on_output: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Starts the engine thread. The callbacks are called on it."""
        config = self.config
        engine = Engine(
            self.runner,
            num_blocks=self.num_blocks,
            hasher=BlockHasher(self.cluster_key, block_size=config.block_size),
            limits=EngineLimits(
                max_model_len=self.request_limits.max_model_len,
                max_batch_tokens=config.max_batch_tokens,
                max_sequences=config.max_sequences,
                max_requests=config.max_requests,
                prefix_caching=config.prefix_caching,
                max_slowdown=config.max_slowdown,
            ),
            source=source,
        )
        self._engine_thread = EngineThread(
            engine, on_output=on_output, on_failure=on_failure, cpus=parse_cpus(config.cpus)
        )
        self._engine_thread.start()

    def touch_pool(self) -> None:
        """Begins to touch the pool's pages, beside everything else; once, when the worker can be used already."""
        self._pages = PoolPages(self.memory)
        self._pages.start()

    def shm_dir(self) -> Path:
        """Where shm sockets go: the configured directory, else a private one that ends with the rank."""
        if self.config.shm_dir:
            return Path(self.config.shm_dir)
        if self._private_dir is None:
            self._private_dir = tempfile.TemporaryDirectory(prefix="staffetta-")
        return Path(self._private_dir.name)

    def stop(self) -> None:
        """Ends the engine thread, then the pool's memory. Whoever reads or exports the pool has been closed before."""
        if self._pages is not None:
            self._pages.stop()
        if self._engine_thread is not None:
            self._engine_thread.stop()
        self._engine_thread = self._pages = None
        del self.runner  # its tensors are views of the memory
        self.memory.close()
        if self._private_dir is not None:
            self._private_dir.cleanup()


def load_rank(config: WorkerConfig, role: common_pb2.WorkerRole.ValueType) -> Rank:
    """Reads the model, makes the pool and loads the weights.

    Raises ModelNotFoundError, ModelRefusedError, UsageError or DoesNotFitError, with the fix.
    """
    name, directory = demo.locate(config.model, config.served_model_name)
    model_config = ModelConfig.from_directory(directory)
    cache = open_cache(config.cache_dir, model=directory)
    digest = remembered_digest(directory, cache)
    dtype = resolve_dtype(config.dtype)
    layout = model_config.kv_layout(block_size=config.block_size, dtype=dtype, model_digest=digest)
    threads = _num_threads(config, quota=cpu_quota())
    num_blocks = config.num_blocks or config.kv_memory // layout.page_bytes
    check_memory(
        config,
        num_blocks=num_blocks,
        page_bytes=layout.page_bytes,
        num_weight_bytes=weight_bytes(model_config, dtype=dtype, quantization=config.quantization),
        num_int4_bytes=weight_bytes(model_config, dtype=dtype, quantization="int4"),
        left=headroom(),
    )
    memory = PoolMemory(num_blocks, layout.page_bytes)
    try:
        runner = load_runner(
            directory,
            model_config,
            layout,
            pool=memory.buffer,
            num_blocks=num_blocks,
            threads=threads,
            device="cpu",
            quantization=config.quantization,
            cache=cache,
        )
    except BackendUnavailableError as error:
        raise UsageError("NO_KERNELS", str(error), why="nothing else computes on a CPU", fix="make setup") from error
    max_model_len = min(
        config.max_model_len or model_config.max_position_embeddings,
        model_config.max_position_embeddings,
        num_blocks * config.block_size,
    )
    # Without a key of the configuration nobody else has this one: peers refuse the pair by its fingerprint.
    cluster_key = bytes.fromhex(config.cluster_key) or secrets.token_bytes(32)
    identity = common_pb2.WorkerIdentity(
        worker_id=config.worker_id or f"{_role_name(role)}-{secrets.token_hex(4)}",
        incarnation=secrets.token_hex(8),
        role=role,
        model=name,
        model_digest=digest,
        numerics_digest=runner.numerics_digest,
        layout=layout_to_proto(layout),
        key_fingerprint=key_fingerprint(cluster_key),
    )
    return Rank(
        config=config,
        identity=identity,
        layout=layout,
        memory=memory,
        num_blocks=num_blocks,
        runner=runner,
        request_limits=Limits(vocab_size=model_config.vocab_size, max_model_len=max_model_len),
        eos_token_ids=tuple(model_config.eos_token_ids),
        cluster_key=cluster_key,
        tickets=TicketBook(),
    )


def open_exporters(rank: Rank) -> list[KVExporter]:
    """Exports the pool by every transport of the configuration that this machine can serve.

    One that cannot be served is told in the log and left out. Raises UsageError when none is left.
    """
    config = rank.config
    exporters: list[KVExporter] = []
    reasons: list[str] = []
    for transport in config.transports:
        try:
            exporters.append(
                export(
                    transport,
                    rank.memory,
                    tickets=rank.tickets,
                    shm_dir=rank.shm_dir(),
                    listen=config.transfer_listen,
                    advertise=config.transfer_advertise,
                )
            )
        except (ValueError, OSError) as error:
            log.warning("transport %s is not offered: %s", transport, error)
            reasons.append(f"{transport}: {error}")
    if not exporters:
        raise UsageError(
            "NO_TRANSPORT",
            "no transport of the configuration can be offered",
            why="; ".join(reasons) or "transports is empty",
            fix="--transports tcp --transfer-listen 127.0.0.1:0",
        )
    return exporters


def _num_threads(config: WorkerConfig, *, quota: float | None) -> int:
    """How many threads compute, where `quota` CPUs' time is left. Raises UsageError for CPUs that cannot be had."""
    cpus = _usable_cpus(config)
    usable = usable_threads(len(cpus), quota)
    threads = config.threads or usable
    bound = "" if quota is None else f", of whose time the control group's quota leaves {quota:g}"
    log.info("computes on %d threads, with %d CPUs%s", threads, len(cpus), bound)
    if quota is not None and threads > usable:
        log.warning(
            "%d threads use up the control group's quota of %g CPUs before its period is over, and then all stop: "
            "--threads %d, or a larger quota",
            threads, quota, usable,
        )  # fmt: skip
    return threads


def _usable_cpus(config: WorkerConfig) -> frozenset[int]:
    """Those that the engine is to keep to, else all that the process may use."""
    available = frozenset(os.sched_getaffinity(0))
    wanted = parse_cpus(config.cpus)
    if wanted - available:
        raise UsageError(
            "NO_SUCH_CPU",
            f"--cpus names {','.join(format_cpus(wanted - available))}",
            why=f"this process may use {','.join(format_cpus(available))}",
            fix=f"--cpus {','.join(format_cpus(available))}",
        )
    if wanted and config.threads > len(wanted):
        raise UsageError(
            "TOO_FEW_CPUS",
            f"--threads {config.threads} on {len(wanted)} CPUs",
            why="threads that wait for one another must be able to run at once",
            fix=f"--threads {len(wanted)}, or more --cpus",
        )
    return wanted or available


def _role_name(role: common_pb2.WorkerRole.ValueType) -> str:
    return "prefill" if role == common_pb2.WORKER_ROLE_PREFILL else "decode"
