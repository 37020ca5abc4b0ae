"""The progress of one request, or of one of its choices: tokens known, tokens computed, blocks, state. Engine thread
only; no decisions here.

One sequence goes through the prompt for all choices of a request. When it has their first tokens it is forked
(`engine.forking`): from then on each choice that goes on has a sequence of its own.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from engine.cache.lease import BlockLease
from engine.cache.pool import IntegrityError
from engine.cache.prefix import PrefixCache
from engine.request import (
    FinishReason,
    PromptToken,
    Request,
    RequestId,
    RequestKind,
    SampledToken,
    SequenceStats,
)
from kvtransfer.layout import BlockId
from staffetta.hashing import BlockHash, BlockHasher


class SequenceState(Enum):
    """Where a sequence is. Cancelling and failure lead from anywhere to FINISHED.

    WAITING ─▶ RUNNING ─▶ FINISHED                         and RUNNING ─▶ WAITING when it is preempted
    WAITING ─▶ AWAITING_KV ─▶ RUNNING                      KV came from elsewhere; WAITING again when it did not
    WAITING ─▶ RUNNING ─▶ HELD ─▶ FINISHED                 a prefill, until it is released
    a fork begins as RUNNING, and its parent ends as FINISHED
    """

    WAITING = "waiting"
    AWAITING_KV = "awaiting_kv"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


class SequenceId(NamedTuple):
    """Names a sequence among those that are queued: its request, and the first choice that it stands for."""

    request_id: RequestId
    choice_index: int

    def __str__(self) -> str:
        return f"{self.request_id}/{self.choice_index}"


OrderKey = tuple[int, int, str, int]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way, for all of `choices`; more than one means that it has not been forked yet.

    `token_ids` are the tokens known: prompt, then generated ones; `num_placeholders` (0 or 1) more are being drawn by a
    step in flight. KV of the first `num_computed_tokens` is in the blocks of `lease`, or will be when the step in
    flight has run.
    """

    request: Request
    hasher: BlockHasher
    lease: BlockLease
    """Empty until its first part is planned, and again after preemption."""
    arrived_at: float
    choices: tuple[int, ...] = ()
    """The request's, or the one that a fork stands for; () is short for the request's."""
    state: SequenceState = SequenceState.WAITING
    open_choices: tuple[int, ...] = field(init=False)
    """Those of `choices` that have no ending; `close` takes from them."""
    first_tokens: dict[int, SampledToken] = field(default_factory=dict)
    """By choice, once they are known and until the fork. A sequence of one choice has its own in `token_ids`."""
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    """Tokens that were asked with."""
    num_placeholders: int = 0
    num_computed_tokens: int = 0
    num_published_blocks: int = 0
    """Leading blocks already offered to the prefix cache; some stay private because their hash had a block."""
    num_reported_blocks: int = 0
    """Leading blocks of a PREFILL already in an output's `final_blocks`."""
    num_scored_tokens: int = 1
    """Leading prompt tokens whose log-probability was told, when the request asks; the first one has none."""
    credit: int | None = field(init=False)
    """Tokens that each open choice may produce: the least of what theirs allow."""
    granted: dict[int, int] = field(init=False)
    """Tokens granted since the request began, by choice."""
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

    sequence_id: SequenceId = field(init=False)
    """Its name in the queues."""
    order: OrderKey = field(init=False)
    """Who comes first: higher priority, then earlier arrival. Victims are taken from the other end."""
    prompt_ids: tuple[int, ...] = ()
    """What a repetition penalty counts of the prompt: the ids in it, rising. Made once, for all choices."""
    hashes: list[BlockHash] = field(default_factory=list)
    """The root of its chain, when that was asked for, and the hashes of its first full blocks so far."""

    def __post_init__(self) -> None:
        self.choices = self.open_choices = self.choices or self.request.choices
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.credit = self.request.credit
        self.granted = dict.fromkeys(self.choices, 0)
        self.sequence_id = SequenceId(self.request.request_id, self.choices[0])
        self.order = (-self.request.priority, self.request.arrival, *self.sequence_id)
        if self.request.sampling.repetition_penalty != 1 and not self.prompt_ids:
            self.prompt_ids = tuple(sorted(set(self.token_ids[: self.num_asked_tokens])))

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self.request.request_id

    @property
    def is_unforked(self) -> bool:
        """Whether it goes through the prompt for several choices."""
        return len(self.choices) > 1

    @property
    def is_prefill(self) -> bool:
        """Whether the request ends, held, with its first token."""
        return self.request.kind is RequestKind.PREFILL

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
        return len(self.token_ids) + self.num_placeholders - self.num_computed_tokens  # asked most often of all

    @property
    def next_output_index(self) -> int:
        """The output position of the next token to be drawn."""
        return self.request.first_token_index + self.num_generated_tokens

    @property
    def has_first_tokens(self) -> bool:
        """Whether every choice's first token is known, maybe from elsewhere."""
        return bool(self.first_tokens) or len(self.token_ids) > self.num_prompt_tokens

    @property
    def is_paused(self) -> bool:
        """Whether the receiver of one of its choices has yet to grant further tokens.

        Before the fork, first tokens that are known already are drawn again, and told to nobody: no credit is needed.
        """
        return self.credit is not None and self.num_generated_tokens >= self.credit and not self.first_tokens

    @property
    def is_drained(self) -> bool:
        """Whether the last token it may have is being drawn."""
        if self.is_prefill or self.is_unforked:
            return self.num_placeholders > 0
        return self.num_generated_tokens >= self.request.sampling.max_tokens - self.request.first_token_index

    @property
    def is_scoring(self) -> bool:
        """Whether the request wants log-probabilities of prompt tokens that have not been told.

        Such a sequence computes its prompt from the first token on: a prefix hit brings no logits. What was generated
        before a restart is not scored.
        """
        is_asked = self.request.sampling.num_prompt_logprobs is not None
        return is_asked and self.num_scored_tokens < self.num_asked_tokens

    @property
    def num_asked_tokens(self) -> int:
        """Tokens of the prompt without those generated before a restart."""
        return self.num_prompt_tokens - self.request.first_token_index

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
        if not self.hashes:
            self.hashes.append(self.hasher.root(salt=self.request.cache_salt))
        while len(self.hashes) <= num_blocks:
            start = (len(self.hashes) - 1) * size
            self.hashes.append(self.hasher.extend(self.hashes[-1], self.token_ids[start : start + size]))
        return self.hashes[1 : num_blocks + 1]

    def append(self, token: SampledToken, *, now: float) -> FinishReason | None:
        """Adds a generated token and says whether the sequence ends with it. `now` is for statistics."""
        if token.index != self.next_output_index:
            raise IntegrityError(f"{self.request_id}: token {token.index} where {self.next_output_index} comes next")
        self.token_ids.append(token.token_id)
        if self.first_token_at is None:
            self.first_token_at = now
        return self.request.sampling.finish_reason(token)

    def grant(self, choice: int, num_tokens: int) -> None:
        """Lets one of `choices` produce more; nothing happens when its credit is unbounded."""
        self.granted[choice] += num_tokens
        self._count_credit()

    def close(self, choices: Collection[int]) -> None:
        """Notes that some of `choices` have their ending; nobody grants them anything, and nobody waits for that."""
        self.open_choices = tuple(choice for choice in self.open_choices if choice not in choices)
        self._count_credit()

    def _count_credit(self) -> None:
        if self.request.credit is not None and self.open_choices:
            self.credit = self.request.credit + min(self.granted[choice] for choice in self.open_choices)

    def learn_first_tokens(self, tokens: tuple[SampledToken, ...], *, now: float) -> None:
        """Remembers the first token of each of `choices` until the fork."""
        if any(token.index != self.next_output_index for token in tokens):
            raise IntegrityError(f"{self.request_id}: {tokens} where token {self.next_output_index} comes next")
        self.first_tokens = dict(zip(self.choices, tokens, strict=True))
        if self.first_token_at is None:
            self.first_token_at = now

    def take_scored(self, tokens: tuple[PromptToken, ...]) -> tuple[PromptToken, ...]:
        """Books scored prompt tokens and returns those not told before: a recomputed prompt is scored again."""
        if not tokens:
            return ()
        new = tuple([token for token in tokens if token.position >= self.num_scored_tokens])
        if new and new[0].position != self.num_scored_tokens:
            raise IntegrityError(f"{self.request_id}: token {new[0].position} scored, {self.num_scored_tokens} is next")
        self.num_scored_tokens += len(new)
        return new

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
