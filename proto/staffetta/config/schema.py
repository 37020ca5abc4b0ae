"""The one configuration schema: every setting of every role, its default, its meaning.

Flags, YAML keys and `STAFFETTA_…` variables are all derived from these dataclasses by `staffetta.config.load`; nothing
else names a setting. A field's `help` is what `--help` prints; `secret` fields are never printed.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

Form = Literal["plain", "bytes", "address", "key", "failpoint", "cpus"]
"""What a setting's text must look like: `bytes` takes 64MiB, `address` is host:port, `key` is 16 to 64 bytes as hex,
`failpoint` is NAME:ACTION:NTH, `cpus` is 0-3 or 8. A Literal names its choices itself."""

MAX_LEASE_S: Final = 600.0
"""The longest lease that a prefill worker grants."""

MAX_HEARTBEAT_S: Final = 60.0
"""A peer silent for longer than three of these is taken for lost; sessions refuse to wait longer."""
MIN_PERIOD_S: Final = 0.01
"""The shortest period of what repeats: at 0 it would spin."""


def setting(
    default: Any,
    text: str,
    *,
    form: Form = "plain",
    minimum: float = 0,
    maximum: float | None = None,
    secret: bool = False,
) -> Any:
    """Declares one setting: its default, its help text, the form of its text, and for a number its bounds, inclusive.

    Every number is a count, a size or a duration, hence never negative.
    """
    bounds = {"minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"help": text, "form": form, "secret": secret} | bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is served. Every role reads it: workers load weights, the gateway only the tokenizer and its neighbours."""

    model: str = setting("demo", "Hugging Face directory, or `demo` for the embedded model")
    served_model_name: str = setting("", "name that clients use; empty means the directory's name")
    max_model_len: int = setting(0, "bound on prompt and generated tokens together; 0 means the model's own")
    cluster_key: str = setting(
        "", "hexadecimal key of the block-hash chain, equal for all; serve draws one", form="key", secret=True
    )
    cache_dir: str = setting(
        "auto",
        "directory of packed weights and digests of models of 64 MiB and more, which processes of one host share; "
        "auto: staffetta under the user's cache directory; empty: none",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe log line that is written")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(ModelConfig):
    """What prefill and decode workers have in common."""

    worker_id: str = setting("", "unique name, [A-Za-z0-9._-]{1,64}; empty derives one from role and pid")
    listen: str = setting("127.0.0.1:0", "host:port of the gRPC server; port 0 takes a free one", form="address")
    advertise: str = setting("", "host:port that peers dial; empty means the listening address", form="address")
    gateways: tuple[str, ...] = setting((), "host:port of every gateway to register with", form="address")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "type of computation and KV; auto: float32 on CPU")
    quantization: Literal["none", "int8", "int8-weight", "int4"] = setting(
        "none",
        "of linear weights at load: int8 (8-bit integers, of activations too, token by token), int8-weight (of weights "
        "alone), int4 (4-bit integers, of weights alone)",
    )
    threads: int = setting(0, "threads for tensor operations; 0 means as many as it has CPUs")
    cpus: tuple[str, ...] = setting(
        (), "CPUs that the engine's threads keep to, such as 0-3,8; empty: all that the process may use", form="cpus"
    )
    block_size: int = setting(16, "token positions in a KV block", minimum=1, maximum=1024)
    num_blocks: int = setting(0, "KV blocks in the pool; 0 derives it from kv_memory")
    kv_memory: int = setting(64 * 2**20, "bytes for the KV pool when num_blocks is 0", form="bytes")
    max_batch_tokens: int = setting(512, "token budget of one step", minimum=1)
    max_sequences: int = setting(64, "sequences computed in one step at most", minimum=1)
    max_slowdown: float = setting(
        1.6,
        "times as long a step may take for a long prompt beside streams, a short one counts as four; more lets prompts "
        "wait less",
        minimum=1,
    )
    max_requests: int = setting(
        1024,
        "choices held at once, of requests running and waiting, of prompts on a prefill worker; beyond it requests "
        "are refused",
        minimum=1,
    )
    prefix_caching: bool = setting(True, "keep finished blocks for later prompts with the same beginning")
    transports: tuple[Literal["shm", "tcp", "loopback"], ...] = setting(("shm", "tcp"), "transports to offer and use")
    shm_dir: str = setting("", "directory of the shm sockets, shared by co-located workers; empty: a private one")
    transfer_listen: str = setting(
        "127.0.0.1:0", "host:port of the tcp transport; port 0 takes a free one", form="address"
    )
    transfer_advertise: str = setting(
        "", "host:port that tcp readers dial; empty means the listening address", form="address"
    )
    heartbeat_s: float = setting(1.0, "seconds between heartbeats", minimum=MIN_PERIOD_S, maximum=MAX_HEARTBEAT_S)
    drain_s: float = setting(10.0, "seconds that running requests get to finish after SIGTERM")
    failpoints: tuple[str, ...] = setting(
        (), "faults to inject, NAME:ACTION:NTH, ACTION kill, stop, raise or on; for tests", form="failpoint"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    """The prefill role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """The decode role."""

    local_prefill: Literal["auto", "never"] = setting(
        "auto", "auto: short prompts and prompts nobody else can take are prefilled here; never: always hand off"
    )
    local_prefill_max_tokens: int = setting(
        16, "uncached prompt tokens up to which auto prefills here; 16 is one block, the least that is worth moving"
    )
    lease_s: float = setting(
        30.0,
        "seconds that a prefill worker holds finished blocks for this worker without hearing of it",
        minimum=MIN_PERIOD_S,
        maximum=MAX_LEASE_S,
    )
    handoff_timeout_s: float = setting(
        10.0, "seconds without progress after which a hand-off is given up", minimum=MIN_PERIOD_S
    )
    handoff_limit_s: float = setting(
        300.0,
        "seconds that one hand-off may take in all, queueing included",
        minimum=MIN_PERIOD_S,
        maximum=MAX_LEASE_S,
    )
    max_handoff_attempts: int = setting(3, "hand-offs tried before the request is prefilled here or fails", minimum=1)
    prefill_peers: tuple[str, ...] = setting(
        (), "host:port of prefill workers to dial besides those the gateway names", form="address"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(ModelConfig):
    """The gateway role."""

    http: str = setting("127.0.0.1:8000", "host:port of the REST door", form="address")
    grpc: str = setting(
        "127.0.0.1:50051", "host:port of the gRPC door; with one process of the registry too", form="address"
    )
    workers: int = setting(
        1,
        "processes that share the doors, and divide max_requests; more than one have the registry in their parent",
        minimum=1,
        maximum=64,
    )
    registry: str = setting(
        "127.0.0.1:50050", "host:port where prefill and decode workers register when workers is above 1", form="address"
    )
    max_requests: int = setting(
        4096, "requests in flight, each choice counted; beyond it they are refused with a retry hint", minimum=1
    )
    max_body_bytes: int = setting(4 * 2**20, "bytes of a request body", form="bytes", minimum=1)
    credit_tokens: int = setting(256, "tokens a worker may produce ahead of a client that does not read", minimum=1)
    start_timeout_s: float = setting(30.0, "seconds a request waits for a worker when none is registered")
    heartbeat_s: float = setting(
        1.0, "seconds between heartbeats on sessions", minimum=MIN_PERIOD_S, maximum=MAX_HEARTBEAT_S
    )
    drain_s: float = setting(10.0, "seconds that running requests get to finish after SIGTERM")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ModelConfig):
    """`staffetta serve`: everything on this machine. Settings of single roles are passed on."""

    prefill: int = setting(1, "prefill workers")
    decode: int = setting(1, "decode workers", minimum=1)
    http: str = setting("127.0.0.1:8000", "host:port of the REST door", form="address")
    grpc: str = setting("127.0.0.1:50051", "host:port of the gRPC door", form="address")
    gateway_workers: int = setting(1, "gateway processes that share the doors", minimum=1, maximum=64)
    pin: bool = setting(
        False, "give each worker's engine CPUs of its own, from the first on, where there are enough for all"
    )
    once: str = setting("", "prompt to answer once, then exit")
    no_local_prefill: bool = setting(False, "decode workers never prefill: every prompt is handed over")
    local_prefill_max_tokens: int = setting(
        16, "uncached prompt tokens up to which decode prefills on its own; 16 is one block"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "type of computation and KV; auto: float32 on CPU")
    quantization: Literal["none", "int8", "int8-weight", "int4"] = setting(
        "none",
        "of linear weights at load: int8 (8-bit integers, of activations too, token by token), int8-weight (of weights "
        "alone), int4 (4-bit integers, of weights alone)",
    )
    threads: int = setting(
        0, "threads per worker; 0 shares the cores out, but gives a worker two where its role's others leave two"
    )
    block_size: int = setting(16, "token positions in a KV block", minimum=1, maximum=1024)
    num_blocks: int = setting(0, "KV blocks of each worker; 0 derives it from kv_memory")
    kv_memory: int = setting(64 * 2**20, "bytes for each worker's KV pool when num_blocks is 0", form="bytes")
    max_batch_tokens: int = setting(512, "token budget of one step", minimum=1)
    max_sequences: int = setting(64, "sequences computed in one step at most", minimum=1)
    max_slowdown: float = setting(
        1.6,
        "times as long a step may take for a long prompt beside streams, a short one counts as four; more lets prompts "
        "wait less",
        minimum=1,
    )
    transports: tuple[Literal["shm", "tcp"], ...] = setting(("shm", "tcp"), "transports to offer and use")
    prefix_caching: bool = setting(True, "keep finished blocks for later prompts with the same beginning")
    drain_s: float = setting(10.0, "seconds that running requests get to finish after Ctrl-C")
    prefill_failpoints: tuple[str, ...] = setting(
        (), "faults to inject into prefill workers, NAME:ACTION:NTH; for tests", form="failpoint"
    )
    decode_failpoints: tuple[str, ...] = setting(
        (), "faults to inject into decode workers, NAME:ACTION:NTH; for tests", form="failpoint"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """`staffetta ask` and `staffetta chat`: clients of a gateway that runs already."""

    address: str = setting("127.0.0.1:50051", "host:port of the gateway's gRPC door", form="address")
    prompt_as: Literal["chat", "text"] = setting("chat", "chat: through the model's template; text: as it is")
    system: str = setting("", "system message that opens the chat")
    temperature: float | None = setting(None, "divides the logits, 0 is greedy; unset: the model's own")
    top_p: float | None = setting(None, "share of probability to sample from; unset: the model's own")
    max_tokens: int | None = setting(None, "most tokens to generate; unset: what the context leaves", minimum=1)
    seed: int | None = setting(None, "key of the random numbers; unset: the gateway draws one")
    timeout_s: float = setting(300.0, "seconds that one answer may take", minimum=MIN_PERIOD_S)
