"""What is asked of a server: the workloads by name, and for one round of one, every prompt and when it is sent. Pure.

All requests are greedy, ignore the end token and carry token ids, so that every server computes the same amount. No two
prompts have a beginning in common, over rounds and servers too, but where a workload shares one by intention.
"""

import random
from dataclasses import dataclass, replace
from typing import Final

FIRST_PROMPT_TOKEN_ID: Final = 262
"""Ids below it may be special tokens or single bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of equal size. Counts are tokens, but for `num_requests` and `concurrency`.

    Closed loop: `concurrency` requests run at any time until `num_requests` are done. Open loop: `rate` requests per
    second arrive as a Poisson process, however many run. `shared_tokens` begin every prompt of a round; then the round
    has a second phase that begins alike and is called warm.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    num_requests: int = 1
    concurrency: int | None = 1
    rate: float | None = None
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError(f"{self.name} needs either a concurrency (closed loop) or a rate (open loop)")
        smallest = min(self.prompt_tokens, self.output_tokens, self.num_requests, self.concurrency or 1)
        if smallest < 1 or (self.rate is not None and self.rate <= 0):
            raise ValueError(f"{self.name} needs at least one of everything it counts, and a rate above 0")

    @property
    def phase_names(self) -> tuple[str, ...]:
        """How the phases of a round are called."""
        return (f"{self.name} cold", f"{self.name} warm") if self.shared_tokens else (self.name,)

    def at_rate(self, rate: float) -> "Workload":
        """The same as an open loop."""
        return replace(self, rate=rate, concurrency=None)


W1: Final = Workload(name="W1", prompt_tokens=512, output_tokens=64)
W2: Final = Workload(name="W2", prompt_tokens=128, output_tokens=64, num_requests=16, concurrency=16)
W3: Final = Workload(name="W3", prompt_tokens=32, shared_tokens=1024, output_tokens=16, num_requests=16, concurrency=16)
W4: Final = Workload(name="W4", prompt_tokens=128, output_tokens=32, num_requests=60, concurrency=16)
"""Sent as a Poisson process at a share of the rate that this closed loop reaches, unless the rate is given."""
WORKLOADS: Final = {workload.name: workload for workload in (W1, W2, W3, W4)}

SHARE_OF_CAPACITY: Final = 0.6
PEER_RATES: Final = {"vllm-w8a8": 1.57, "vllm-bf16": 0.48, "openvino-int8": 1.05, "llama.cpp-q8": 0.46}
"""W4's rates, in requests per second, that were 60 % of a peer's capacity on the 0.5b shape with two threads each."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: when it is due, in seconds after its phase begins, and its prompt's token ids."""

    due_s: float
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests that are sent together: at most `concurrency` at a time, or each when it is due where that is None."""

    name: str
    requests: tuple[PlannedRequest, ...]
    concurrency: int | None
    output_tokens: int


def plan_round(workload: Workload, *, seed: str, vocab_size: int) -> tuple[Phase, ...]:
    """The phases of one round, a function of its arguments.

    Raises ValueError for a vocabulary too small to draw from.
    """
    if vocab_size <= FIRST_PROMPT_TOKEN_ID:
        raise ValueError(f"vocab_size is {vocab_size}, needs more than {FIRST_PROMPT_TOKEN_ID}")
    rng = random.Random(f"{seed}/{workload.name}")

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(FIRST_PROMPT_TOKEN_ID, vocab_size), k=count))

    shared = draw(workload.shared_tokens)
    phases = []
    for name in workload.phase_names:
        due_s = 0.0
        requests = []
        for _ in range(workload.num_requests):
            requests.append(PlannedRequest(due_s, shared + draw(workload.prompt_tokens)))
            due_s += rng.expovariate(workload.rate) if workload.rate else 0.0
        phases.append(Phase(name, tuple(requests), workload.concurrency, workload.output_tokens))
    return tuple(phases)
