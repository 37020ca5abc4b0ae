"""The progress of one request: tokens known, tokens computed, blocks, state. Engine thread only; no decisions here."""

from dataclasses import dataclass, field
from enum import Enum

from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import PrefixCache
from engine.request import FinalBlock, FinishReason, Request, RequestId, RequestKind, SampledToken, SequenceStats
from kvtransfer.layout import BlockId
from staffetta.hashing import BlockHash, BlockHasher


class SequenceState(Enum):
    """Where a sequence is. Cancelling and failure lead from anywhere to FINISHED.

    WAITING ─▶ RUNNING ─▶ FINISHED                         and RUNNING ─▶ WAITING when it is preempted
    WAITING ─▶ AWAITING_KV ─▶ RUNNING                      KV came from elsewhere; WAITING again when it did not
    WAITING ─▶ RUNNING ─▶ HELD ─▶ FINISHED                 a prefill, until it is released
    """

    WAITING = "waiting"
    AWAITING_KV = "awaiting_kv"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


OrderKey = tuple[int, int, str]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way.

    `token_ids` are the tokens known: prompt, then generated ones; `num_placeholders` (0 or 1) more are being drawn by a
    step in flight. KV of the first `num_computed_tokens` is in the blocks of `lease`, or will be when the step in
    flight has run. `chain` grows with the full blocks of known tokens.
    """

    request: Request
    hasher: BlockHasher
    lease: BlockLease
    """Empty until its first part is planned, and again after preemption."""
    arrived_at: float
    state: SequenceState = SequenceState.WAITING
    token_ids: list[int] = field(init=False)
    num_placeholders: int = 0
    num_computed_tokens: int = 0
    num_published_blocks: int = 0
    """Leading blocks already offered to the prefix cache; some stay private because their hash had a block."""
    num_reported_blocks: int = 0
    """Leading blocks of a PREFILL already in an output's `final_blocks`."""
    credit: int | None = field(init=False)
    num_shrunk: int = 0
    """How often an attempt started over because the local prefix had shrunk."""

    started_at: float | None = None
    first_token_at: float | None = None
    num_cached_tokens: int | None = None
    num_local_prompt_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_preemptions: int = 0
    max_computed_tokens: int = 0
    """The furthest that computing ever came; below it everything is recomputing."""

    order: OrderKey = field(init=False)
    """Who comes first: higher priority, then earlier arrival. Victims are taken from the other end."""
    _chain: list[BlockHash] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.credit = self.request.credit
        self.order = (-self.request.priority, self.request.arrival, self.request.request_id)

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self.request.request_id

    @property
    def is_prefill(self) -> bool:
        """Whether the request ends, held, with its first token."""
        return self.request.kind is RequestKind.PREFILL

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that were asked with."""
        return len(self.request.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and generated tokens, one being drawn included."""
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated since this request began, one being drawn included."""
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known and not computed."""
        return self.num_known_tokens - self.num_computed_tokens

    @property
    def next_output_index(self) -> int:
        """The output position of the next token to be drawn."""
        return self.request.first_token_index + self.num_generated_tokens

    @property
    def is_paused(self) -> bool:
        """Whether the receiver has yet to grant further tokens."""
        return self.credit is not None and self.num_generated_tokens >= self.credit

    @property
    def is_drained(self) -> bool:
        """Whether the last token it may have is being drawn."""
        limit = 1 if self.is_prefill else self.request.sampling.max_tokens - self.request.first_token_index
        return self.num_generated_tokens >= limit

    @property
    def is_computable(self) -> bool:
        """Whether a step may compute some of it."""
        return self.num_pending_tokens > 0 and not self.is_paused and not self.is_drained

    @property
    def num_prompt_blocks(self) -> int:
        """Blocks that hold the whole prompt."""
        return self.num_blocks_for(self.num_prompt_tokens)

    @property
    def num_leased_blocks(self) -> int:
        """Blocks it holds."""
        return len(self.lease)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the first `num_tokens` tokens."""
        return -(-num_tokens // self.hasher.block_size)

    def chain(self, num_blocks: int) -> list[BlockHash]:
        """Hashes of the first `num_blocks` blocks, which must be full of known tokens."""
        size = self.hasher.block_size
        if not self._chain:
            self._chain.append(self.hasher.root(salt=self.request.cache_salt))
        while len(self._chain) <= num_blocks:
            start = (len(self._chain) - 1) * size
            self._chain.append(self.hasher.extend(self._chain[-1], self.token_ids[start : start + size]))
        return self._chain[1 : num_blocks + 1]

    def append(self, token: SampledToken, *, now: float) -> FinishReason | None:
        """Adds a generated token and says whether the sequence ends with it. `now` is for statistics."""
        if token.index != self.next_output_index:
            raise IntegrityError(f"{self.request_id}: token {token.index} where {self.next_output_index} comes next")
        self.token_ids.append(token.token_id)
        if self.first_token_at is None:
            self.first_token_at = now
        return self.request.sampling.finish_reason(token)

    def publish(self, prefix: PrefixCache, *, num_final_tokens: int) -> None:
        """Offers blocks that became full and final to the prefix cache."""
        num_full = num_final_tokens // self.hasher.block_size
        if num_full <= self.num_published_blocks:
            return
        chain = self.chain(num_full)
        for index in range(self.num_published_blocks, num_full):
            prefix.publish(self.lease.table[index], chain[index])
        self.num_published_blocks = num_full

    def release_blocks(self) -> None:
        """Gives every block back and forgets what was computed in them."""
        self.lease.release()
        self.num_computed_tokens = self.num_published_blocks = 0

    def keep_blocks(self, num_blocks: int) -> BlockLease:
        """Goes back to the first `num_blocks` full blocks and returns the lease of the others."""
        rest = self.lease.split(num_blocks)
        self.num_computed_tokens = num_blocks * self.hasher.block_size
        self.num_published_blocks = min(self.num_published_blocks, num_blocks)
        return rest

    def count_computed(self, start: int, end: int) -> None:
        """Books the computing of positions [start, end) as new or repeated."""
        first_new = max(start, self.max_computed_tokens)
        self.num_recomputed_tokens += max(0, min(end, self.max_computed_tokens) - start)
        self.num_local_prompt_tokens += max(0, min(end, self.num_prompt_tokens) - first_new)
        self.max_computed_tokens = max(self.max_computed_tokens, end)

    def new_final_blocks(self, pool: BlockPool) -> tuple[FinalBlock, ...]:
        """Blocks of a PREFILL that became final since the last call; the last one may be part full."""
        size, num_tokens = self.hasher.block_size, self.num_prompt_tokens
        is_complete = self.num_computed_tokens >= num_tokens
        num_final = self.num_prompt_blocks if is_complete else self.num_computed_tokens // size
        chain = self.chain(min(num_final, num_tokens // size))
        blocks = [
            FinalBlock(
                block_id=self.lease.table[index],
                block_index=index,
                num_tokens=min(size, num_tokens - index * size),
                generation=pool.generation(self.lease.table[index]),
                chain_hash=chain[index] if index < len(chain) else None,
            )
            for index in range(self.num_reported_blocks, num_final)
        ]
        self.num_reported_blocks = num_final
        return tuple(blocks)

    def stats(self, *, now: float) -> SequenceStats:
        """What it cost up to `now`."""
        started_at = now if self.started_at is None else self.started_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return SequenceStats(
            num_cached_tokens=self.num_cached_tokens or 0,
            num_local_prompt_tokens=self.num_local_prompt_tokens,
            num_recomputed_tokens=self.num_recomputed_tokens,
            num_preemptions=self.num_preemptions,
            queue_s=started_at - self.arrived_at,
            prefill_s=max(0.0, first_token_at - started_at),
        )

    def block_ids(self, num_tokens: int) -> tuple[BlockId, ...]:
        """Blocks that cover the first `num_tokens` positions."""
        return self.lease.table.first(self.num_blocks_for(num_tokens))
