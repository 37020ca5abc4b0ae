"""Chooses which pair of workers serves a request. A pure function of what is known; no I/O, no clock, no randomness.

Costs are in tokens of work: what a worker has before it, less what its prefix cache spares this request. The pair of
least cost wins; of equals, the one chosen longest ago, then the one whose names sort first. Never chooses a worker that
drains, that has no room for every choice, or whose context is too short; and never pairs workers whose arithmetic
differs: their links are refused when they are opened, but what a decode worker reports of its links may be older than a
prefill worker that has come back, under the same name, with another build.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

SEQUENCE_COST: Final = 16
"""Work, in tokens, that a held sequence stands for: it takes a share of every step to come."""
STALLED_COST: Final = 1_000_000
"""Put on a worker whose engine does not advance: it is chosen only when nobody else can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as the router sees it.

    `num_pending_tokens` counts prompt tokens still to be computed, those routed since the last report included.
    `cached_blocks` holds short hashes of reusable blocks. `numerics_digest` names its arithmetic. `last_chosen` grows
    with every choice; 0 means never.
    """

    worker_id: str
    block_size: int
    num_pending_tokens: int = 0
    num_sequences: int = 0
    num_available_blocks: int = 0
    is_draining: bool = False
    is_stalled: bool = False
    cached_blocks: Collection[int] = frozenset()
    numerics_digest: str = ""
    last_chosen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView(WorkerView):
    """A decode worker that the gateway has a session to. `links` names prefill workers it has a working session to.

    `max_requests` bounds what it holds at once, and `num_in_flight` is what this gateway has there, in choices.
    """

    max_requests: int
    max_model_len: int
    num_in_flight: int = 0
    links: frozenset[str] = frozenset()
    prefills_locally: bool = True


class Snapshot(NamedTuple):
    """All workers at one moment."""

    decode: Sequence[DecodeView]
    prefill: Sequence[WorkerView]


class Route(NamedTuple):
    """The chosen pair. `prefill_worker` None leaves the prefill to the decode worker."""

    decode_worker: str
    prefill_worker: str | None


class Refusal(Enum):
    """Why there is no route."""

    NO_WORKER = "no decode worker is there that can take the request"
    FULL = "every decode worker holds as many requests as it may"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request needs. `hashes` has the short hashes of its full blocks, first to last, for each block size in
    use. Each of `num_choices` produces up to `max_tokens`. `numerics_digest` is the one that the worker must have
    because the client has numbers that go with it; empty: any.
    """

    num_prompt_tokens: int
    max_tokens: int
    num_choices: int = 1
    numerics_digest: str = ""
    hashes: Mapping[int, Sequence[int]]
    excluded: Collection[str] = frozenset()


def choose(snapshot: Snapshot, demand: Demand) -> Route | Refusal:
    """The pair that serves `demand` at least cost, or why there is none."""
    able = [worker for worker in snapshot.decode if _is_able(worker, demand)]
    open_to_more = [worker for worker in able if worker.num_in_flight + demand.num_choices <= worker.max_requests]
    prefill = [worker for worker in snapshot.prefill if not worker.is_draining]
    ranked = [
        ((cost, last_chosen, route.decode_worker, route.prefill_worker or ""), route)
        for worker in open_to_more
        for cost, last_chosen, route in _pairs(worker, prefill, demand)
    ]
    if ranked:
        return min(ranked)[1]
    return Refusal.FULL if able and not open_to_more else Refusal.NO_WORKER


def matched_tokens(worker: WorkerView, hashes: Mapping[int, Sequence[int]]) -> int:
    """Tokens at the prompt's beginning that the worker's prefix cache holds."""
    num_blocks = 0
    for block_hash in hashes.get(worker.block_size, ()):
        if block_hash not in worker.cached_blocks:
            break
        num_blocks += 1
    return num_blocks * worker.block_size


def _is_able(worker: DecodeView, demand: Demand) -> bool:
    fits = demand.num_prompt_tokens + demand.max_tokens <= worker.max_model_len
    is_equal = demand.numerics_digest in ("", worker.numerics_digest)
    return fits and is_equal and not worker.is_draining and worker.worker_id not in demand.excluded


def _pairs(worker: DecodeView, prefill: Sequence[WorkerView], demand: Demand) -> Iterator[tuple[int, int, Route]]:
    """Every route over one decode worker with its cost and when its younger half was chosen last.

    Without any linked prefill worker the decode worker is a route of its own, if it may prefill.
    """
    matched = matched_tokens(worker, demand.hashes)
    num_tokens = demand.num_prompt_tokens + demand.num_choices * demand.max_tokens
    shortage = max(0, num_tokens - matched - worker.num_available_blocks * worker.block_size)
    cost = _load(worker) + shortage - matched
    linked = [
        peer for peer in prefill if peer.worker_id in worker.links and peer.numerics_digest == worker.numerics_digest
    ]
    for peer in linked:
        spared = matched_tokens(peer, demand.hashes)
        # What decode holds need not be computed again, so only what the peer's cache holds beyond it counts.
        yield (
            cost + _load(peer) - max(0, spared - matched),
            max(worker.last_chosen, peer.last_chosen),
            Route(worker.worker_id, peer.worker_id),
        )
    if not linked and worker.prefills_locally:
        yield cost, worker.last_chosen, Route(worker.worker_id, None)


def _load(worker: WorkerView) -> int:
    stalled = STALLED_COST if worker.is_stalled else 0
    return worker.num_pending_tokens + SEQUENCE_COST * worker.num_sequences + stalled
