"""The engine's `KVSource` of a decode worker: brings prompts' KV from prefill workers.

The engine thread calls the protocol's methods; the event loop runs the attempts. Between them go only values: calls are
posted to the loop in order, events to the engine through a queue that `poll` empties.
"""

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from decode_svc.decision import PrefillPolicy, choose_prefill
from decode_svc.handoff import Handoff, HandoffRecord, HandoffState
from decode_svc.peers import Peers
from engine.cache.source import AttemptId, KVEvent, KVFailed, KVOffer, KVQuiesced
from engine.request import PromptToken, Request, RequestId, SampledToken
from kvtransfer.layout import BlockId, KVLayout
from kvtransfer.memory import PoolMemory
from staffetta.errors import HandoffFailedError
from staffetta.hashing import BlockHash
from staffetta.v1 import common_pb2, control_pb2, prefill_pb2

FirstTokensSink = Callable[[RequestId, tuple[SampledToken, ...]], None]
PromptTokensSink = Callable[[RequestId, tuple[PromptToken, ...]], None]


@dataclass(slots=True)
class Route:
    """How one request may be prefilled, and what came of it.

    `tried`, `num_attempts` and `chosen` belong to the engine thread, `record` to the event loop; the rest is constant.
    """

    preferred: str
    may_recover: bool
    sampling: common_pb2.SamplingParams
    record: HandoffRecord = field(default_factory=HandoffRecord)
    tried: set[str] = field(default_factory=set)
    num_attempts: int = 0
    chosen: str = ""


class HandoffSource:
    """All hand-offs of one decode worker."""

    def __init__(
        self,
        policy: PrefillPolicy,
        *,
        memory: PoolMemory,
        layout: KVLayout,
        timeout_s: float,
        limit_s: float,
        lease_s: float,
        on_first_tokens: FirstTokensSink,
        on_prompt_tokens: PromptTokensSink,
        wake_engine: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._memory = memory
        self._layout = layout
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._lease_s = lease_s
        self._on_first_tokens = on_first_tokens
        self._on_prompt_tokens = on_prompt_tokens
        self._wake_engine = wake_engine
        self._loop = asyncio.get_running_loop()
        self._peers: Peers | None = None
        self._routes: dict[RequestId, Route] = {}  # written by the loop, read by both
        self._events: deque[KVEvent] = deque()  # appended by the loop, emptied by the engine thread
        self._attempts: dict[AttemptId, Handoff] = {}  # loop
        self._tasks: set[asyncio.Task[None]] = set()  # loop
        self._counts: Counter[tuple[str, str]] = Counter()  # loop

    # Event loop

    def use(self, peers: Peers) -> None:
        """Connects the source to the sessions it uses; once, before the first request."""
        self._peers = peers

    def add_route(self, request_id: RequestId, route: Route) -> None:
        """Announces a request; before the engine gets it."""
        self._routes[request_id] = route

    def drop_route(self, request_id: RequestId) -> None:
        """Forgets an ended request."""
        del self._routes[request_id]

    def counts(self) -> list[control_pb2.HandoffCount]:
        """How attempts ended since the start."""
        return [
            control_pb2.HandoffCount(state=state, outcome=outcome, count=count)
            for (state, outcome), count in sorted(self._counts.items())
        ]

    def num_attempts(self) -> int:
        """Attempts that have not ended."""
        return len(self._attempts)

    async def close(self) -> None:
        """Gives every attempt up and waits until nothing touches the pool any more."""
        for handoff in tuple(self._attempts.values()):
            handoff.stop(None)
        await asyncio.gather(*tuple(self._tasks))

    # Engine thread: the KVSource protocol

    def lookup(self, request: Request, *, num_cached_tokens: int, num_known_tokens: int) -> KVOffer | None:
        """Offers the whole prompt from a prefill worker, or nothing; see `decision.choose_prefill`."""
        route = self._routes.get(request.request_id)
        if route is None or self._peers is None:
            return None
        chosen = choose_prefill(
            self._policy,
            num_missing_tokens=len(request.prompt_token_ids) - num_cached_tokens,
            preferred=route.preferred,
            peers=self._peers.views,
            tried=route.tried,
            num_attempts=route.num_attempts,
        )
        if chosen is None:
            return None
        route.chosen = chosen
        return KVOffer(num_tokens=len(request.prompt_token_ids))

    def begin(self, attempt_id: AttemptId, request: Request, *, num_cached_tokens: int) -> None:
        """Asks the chosen prefill worker."""
        route = self._routes.get(request.request_id)
        if route is None:
            # The request ended on the loop while the engine was starting it; its cancel is on the way.
            return
        route.num_attempts += 1
        route.tried.add(route.chosen)
        self._to_loop(self._begin, attempt_id, request, num_cached_tokens, route.chosen, route)

    def grant(
        self,
        attempt_id: AttemptId,
        *,
        block_ids: tuple[BlockId, ...],
        first_block_index: int,
        chain_hashes: tuple[BlockHash, ...],
    ) -> None:
        """Passes the leased blocks on to the attempt."""
        self._to_loop(self._grant, attempt_id, block_ids, first_block_index, chain_hashes)

    def abandon(self, attempt_id: AttemptId) -> None:
        """Ends the attempt. Every grant is answered by one `KVQuiesced` or by the last `KVLanded`."""
        self._to_loop(self._abandon, attempt_id)

    def poll(self) -> Sequence[KVEvent]:
        """What happened since the last call."""
        events: list[KVEvent] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    # Event loop: what the engine's calls become

    def _begin(
        self, attempt_id: AttemptId, request: Request, num_held_tokens: int, worker_id: str, route: Route
    ) -> None:
        session = self._peers.session(worker_id) if self._peers is not None else None
        if session is None:
            route.record.num_failed += 1
            self._counts[HandoffState.OPEN.value, "failed"] += 1
            lost = HandoffFailedError(f"the hand-off failed: {worker_id} is gone")
            self._post(KVFailed(attempt_id, None if route.may_recover else lost))
            return
        handoff = Handoff(
            attempt_id=attempt_id,
            handoff_id=secrets.token_hex(16),
            request=request,
            num_held_tokens=num_held_tokens,
            peer=session,
            memory=self._memory,
            group=self._layout.groups[0],
            record=route.record,
            timeout_s=self._timeout_s,
            limit_s=self._limit_s,
            post=self._post,
            emit=lambda tokens: self._on_first_tokens(request.request_id, tokens),
            emit_prompt=lambda tokens: self._on_prompt_tokens(request.request_id, tokens),
            may_recover=route.may_recover,
        )
        self._attempts[attempt_id] = handoff
        start = prefill_pb2.StartPrefill(
            handoff_id=handoff.handoff_id,
            request_id=request.request_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_held_tokens=num_held_tokens,
            sampling=route.sampling,
            cache_salt=request.cache_salt,
            lease_s=self._lease_s,
            priority=request.priority,
            first_token_index=request.first_token_index,
            choice_index=request.choices[0],
        )
        task = asyncio.create_task(self._run(handoff), name=f"handoff-{handoff.handoff_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        session.start(handoff, start)
        self._refresh()

    async def _run(self, handoff: Handoff) -> None:
        try:
            await handoff.run()
        finally:
            del self._attempts[handoff.attempt_id]
            self._refresh()
            self._counts[_outcome(handoff)] += 1

    def _grant(
        self,
        attempt_id: AttemptId,
        block_ids: tuple[BlockId, ...],
        first_block_index: int,
        chain_hashes: tuple[BlockHash, ...],
    ) -> None:
        handoff = self._attempts.get(attempt_id)
        if handoff is None:
            # It failed while the grant was on its way: nothing has touched these blocks, nothing will.
            self._post(KVQuiesced(attempt_id))
            return
        handoff.on_granted(block_ids=block_ids, first_block_index=first_block_index, chain_hashes=chain_hashes)

    def _abandon(self, attempt_id: AttemptId) -> None:
        handoff = self._attempts.get(attempt_id)
        if handoff is not None:
            handoff.stop(None)

    def _refresh(self) -> None:
        if self._peers is not None:
            self._peers.refresh_views()

    def _post(self, event: KVEvent) -> None:
        self._events.append(event)
        self._wake_engine()

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)


def _outcome(handoff: Handoff) -> tuple[str, str]:
    ended_in = (handoff.ended_in or handoff.state).value
    if handoff.ended_in is HandoffState.COMMITTED or (handoff.is_answered and not handoff.has_failed):
        return ended_in, "done"
    return ended_in, "failed" if handoff.has_failed else "abandoned"
