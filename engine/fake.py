"""A runner and a KV source without a model: the shipped doubles of `engine.runner` and of every real source.

`FakeRunner` is an oracle. What it "computes" for a position is a digest of everything before it, *read back through the
block table*; the next token is a function of those digests. A wrong table, a block reused too early or a stale one
gives other tokens than `expected_tokens`, or an exception where nothing was ever written.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.cache.source import AttemptId, KVEvent, KVFailed, KVFirstTokens, KVLanded, KVOffer, KVQuiesced, KVReady
from engine.request import PromptToken, Request, RequestId, SampledToken
from engine.sequence import SequenceId
from engine.step import Draw, NothingBegun, SequenceSlice, SliceResult
from kvtransfer.layout import BlockId
from staffetta.errors import StaffettaError
from staffetta.hashing import BlockHash

VOCAB_SIZE = 64

Slot = tuple[BlockId, int]


class _Context:
    """A running digest of stored values, from position 0 on."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def compute(self, token_id: int) -> bytes:
        """The value of the next position, if `token_id` is there; it depends on every value before."""
        digest = self._digest.copy()
        digest.update(struct.pack("<I", token_id))
        return digest.digest()

    def read(self, value: bytes) -> None:
        """Goes on by one position, whose stored value is `value`."""
        self._digest.update(value)

    def draw(self, draw: Draw, choice: int) -> SampledToken:
        """The token of `choice` that follows all values read, and what penalties count.

        Stop tokens are masked as long as `min_tokens` says.
        """
        sampling, output_index = draw.sampling, draw.output_index
        number = self._number(choice, *draw.prompt_token_ids, len(draw.prompt_token_ids), *draw.output_token_ids)
        token_id = number % VOCAB_SIZE
        while output_index < sampling.min_tokens and token_id in sampling.stop_token_ids:
            token_id = (token_id + 1) % VOCAB_SIZE
        logprob = None if sampling.num_logprobs is None else -(number % 4096) / 1024
        return SampledToken(output_index, token_id, logprob)

    def score(self, position: int, token_id: int, num_alternatives: int) -> PromptToken:
        """How likely `token_id` is after all values read, which end before `position`."""
        likeliest = tuple((self._number(rank) % VOCAB_SIZE, -rank / 1024) for rank in range(num_alternatives))
        return PromptToken(position, token_id, -(self._number(token_id) % 4096) / 1024, likeliest)

    def _number(self, *salts: int) -> int:
        digest = self._digest.copy()
        digest.update(struct.pack(f"<{len(salts)}I", *salts))
        return int.from_bytes(digest.digest(), "little")


def expected_tokens(request: Request, choice: int | None = None) -> tuple[SampledToken, ...]:
    """All tokens that a choice of `request`, by default the first, generates to its end, whoever computes it."""
    context = _Context()
    for token_id in request.prompt_token_ids:
        context.read(context.compute(token_id))
    sampling = request.sampling
    history = list(request.prompt_token_ids)
    num_asked = len(history) - request.first_token_index
    tokens: list[SampledToken] = []
    for index in range(request.first_token_index, sampling.max_tokens):
        in_prompt = sorted(set(history[:num_asked])) if sampling.repetition_penalty != 1 else ()
        counted = (tuple(in_prompt), tuple(history[num_asked:])) if sampling.is_penalised else ((), ())
        token = context.draw(Draw(sampling, index, (), *counted), request.choices[0] if choice is None else choice)
        tokens.append(token)
        if token.token_id in sampling.stop_token_ids:
            break
        history.append(token.token_id)
        context.read(context.compute(token.token_id))
    return tuple(tokens)


def expected_prompt_tokens(request: Request) -> tuple[PromptToken, ...]:
    """What `request` is told of its prompt: every position from 1 on, or nothing when it does not ask."""
    num_alternatives = request.sampling.num_prompt_logprobs
    if num_alternatives is None:
        return ()
    context = _Context()
    scored: list[PromptToken] = []
    asked = request.prompt_token_ids[: len(request.prompt_token_ids) - request.first_token_index]
    for position, token_id in enumerate(asked):
        if position > 0:
            scored.append(context.score(position, token_id, num_alternatives))
        context.read(context.compute(token_id))
    return tuple(scored)


class FakeRunner(NothingBegun):
    """Computes steps on numbers instead of tensors.

    `failing` names requests whose slices raise, and sequences: of those, slices that draw.
    """

    def __init__(self, *, block_size: int) -> None:
        self._block_size = block_size
        self._values: dict[Slot, bytes] = {}
        self.failing: set[RequestId | SequenceId] = set()
        self.num_runs = 0

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        """As `Runner.run`. Raises RuntimeError for a failing request, and when an unwritten slot is read or copied."""
        self.num_runs += 1
        for token_slice in slices:
            self._copy(token_slice)
        return [self._run_slice(token_slice) for token_slice in slices]

    def write(self, block_ids: Sequence[BlockId], token_ids: Sequence[int], *, start: int) -> None:
        """Writes what positions from `start` to the end of `token_ids` hold into blocks of indices from `start` on.

        `block_ids[0]` is the block of position `start`, a multiple of the block size.
        """
        context = _Context()
        for position, token_id in enumerate(token_ids):
            value = context.compute(token_id)
            context.read(value)
            if position >= start:
                index, offset = divmod(position - start, self._block_size)
                self._values[block_ids[index], offset] = value

    def holds(self, block_ids: Sequence[BlockId], token_ids: Sequence[int], *, start: int = 0) -> bool:
        """Whether the blocks hold what `write` with the same arguments would leave in them."""
        context = _Context()
        for position, token_id in enumerate(token_ids):
            value = context.compute(token_id)
            context.read(value)
            index, offset = divmod(position - start, self._block_size)
            if position >= start and self._values.get((block_ids[index], offset)) != value:
                return False
        return True

    def spoil(self, block_ids: Sequence[BlockId]) -> None:
        """Writes bytes into blocks that belong to no prompt, as a late read would."""
        for block_id in block_ids:
            for offset in range(self._block_size):
                self._values[block_id, offset] = b"spoiled"

    def _copy(self, token_slice: SequenceSlice) -> None:
        """Copies what the slice reads of its block, and forgets what else was in the destination."""
        if token_slice.copy is None:
            return
        source, destination = token_slice.copy
        for offset in range(self._block_size):
            self._values.pop((destination, offset), None)
        for offset in range(token_slice.start % self._block_size):
            if (source, offset) not in self._values:
                raise RuntimeError(f"offset {offset} of block {source} is copied and was never written")
            self._values[destination, offset] = self._values[source, offset]

    def _run_slice(self, token_slice: SequenceSlice) -> SliceResult:
        draw, score = token_slice.draw, token_slice.score
        choices = () if draw is None else draw.choices
        names = {token_slice.request_id, *(SequenceId(token_slice.request_id, choice) for choice in choices[:1])}
        if not self.failing.isdisjoint(names):
            raise RuntimeError(f"told to fail for {token_slice.request_id}")
        end = token_slice.start + len(token_slice.token_ids)
        if len(token_slice.block_ids) * self._block_size < end:
            raise RuntimeError(f"{len(token_slice.block_ids)} blocks do not hold {end} tokens")
        slots = [(token_slice.block_ids[p // self._block_size], p % self._block_size) for p in range(end)]
        context = _Context()
        targets = iter(() if score is None else score.targets)
        scored: list[PromptToken] = []
        for position, slot in enumerate(slots):
            if position >= token_slice.start:
                self._values[slot] = context.compute(token_slice.token_ids[position - token_slice.start])
            elif slot not in self._values:
                raise RuntimeError(f"position {position} of {token_slice.request_id} was never written")
            context.read(self._values[slot])
            if score is not None and position >= token_slice.start and (target := next(targets, None)) is not None:
                scored.append(context.score(position + 1, target, score.num_alternatives))
        tokens = () if draw is None else tuple([context.draw(draw, choice) for choice in choices])
        return SliceResult(tokens, tuple(scored))


@dataclass(slots=True)
class FakeAttempt:
    """What the fake source knows of one attempt."""

    attempt_id: AttemptId
    request: Request
    num_cached_tokens: int
    block_ids: tuple[BlockId, ...] | None = None
    """Granted blocks; None before the grant."""
    chain_hashes: tuple[BlockHash, ...] = ()
    num_landed_tokens: int = field(init=False)
    is_ready: bool = False
    has_sent_tokens: bool = False
    is_over: bool = False
    is_quiesced: bool = False

    def __post_init__(self) -> None:
        self.num_landed_tokens = self.num_cached_tokens


class FakeSource:
    """A KV source whose moves its user makes: `ready`, `land`, `send_first_tokens`, `fail`, `quiesce`.

    It offers every prompt whose id is in `offering`, every one when that is None, at most `max_attempts` times. Until
    an attempt that ended early is quiesced, `poll` keeps writing garbage into its blocks: whoever reuses them too soon
    gets wrong tokens.
    """

    def __init__(
        self, runner: FakeRunner, *, block_size: int, max_attempts: int = 3, on_news: Callable[[], None] = lambda: None
    ) -> None:
        self._runner = runner
        self._block_size = block_size
        self._max_attempts = max_attempts
        self._on_news = on_news
        self._events: list[KVEvent] = []
        self._num_begun: dict[RequestId, int] = {}
        self.attempts: dict[AttemptId, FakeAttempt] = {}
        self.offering: set[RequestId] | None = None
        self.refusing: dict[RequestId, StaffettaError] = {}
        """What `lookup` raises, by request."""
        self.lookups: list[tuple[RequestId, int, int]] = []
        """Every lookup: request, cached tokens, known tokens."""

    def lookup(self, request: Request, *, num_cached_tokens: int, num_known_tokens: int) -> KVOffer | None:
        """Offers the whole prompt, or nothing."""
        request_id = request.request_id
        self.lookups.append((request_id, num_cached_tokens, num_known_tokens))
        if request_id in self.refusing:
            raise self.refusing[request_id]
        is_offered = self.offering is None or request_id in self.offering
        if not is_offered or self._num_begun.get(request_id, 0) >= self._max_attempts:
            return None
        return KVOffer(len(request.prompt_token_ids))

    def begin(self, attempt_id: AttemptId, request: Request, *, num_cached_tokens: int) -> None:
        """Notes the attempt."""
        self._num_begun[request.request_id] = self._num_begun.get(request.request_id, 0) + 1
        self.attempts[attempt_id] = FakeAttempt(attempt_id, request, num_cached_tokens)

    def grant(
        self,
        attempt_id: AttemptId,
        *,
        block_ids: tuple[BlockId, ...],
        first_block_index: int,
        chain_hashes: tuple[BlockHash, ...],
    ) -> None:
        """Notes the blocks. Raises RuntimeError for a grant that does not fit what was begun."""
        attempt = self.attempts[attempt_id]
        num_blocks = -(-len(attempt.request.prompt_token_ids) // self._block_size)
        if first_block_index * self._block_size != attempt.num_cached_tokens or attempt.block_ids is not None:
            raise RuntimeError(f"granted from block {first_block_index} on: {attempt}")
        if first_block_index + len(block_ids) != num_blocks:
            raise RuntimeError(f"{len(block_ids)} blocks granted: {attempt}")
        attempt.block_ids, attempt.chain_hashes = block_ids, chain_hashes

    def abandon(self, attempt_id: AttemptId) -> None:
        """Ends the attempt without an event."""
        attempt = self.attempts[attempt_id]
        attempt.is_over = True

    def poll(self) -> list[KVEvent]:
        """The moves since the last call."""
        for attempt in self.attempts.values():
            if attempt.is_over and not attempt.is_quiesced:
                self._runner.spoil(self.unlanded(attempt))
        events, self._events = self._events, []
        return events

    def unlanded(self, attempt: FakeAttempt) -> tuple[BlockId, ...]:
        """Granted blocks that a read may still write into."""
        num_landed_blocks = (attempt.num_landed_tokens - attempt.num_cached_tokens) // self._block_size
        if attempt.num_landed_tokens == len(attempt.request.prompt_token_ids):
            return ()
        return (attempt.block_ids or ())[num_landed_blocks:]

    def ready(self, attempt_id: AttemptId) -> None:
        """Says that bytes exist."""
        self.attempts[attempt_id].is_ready = True
        self._tell(KVReady(attempt_id))

    def land(self, attempt_id: AttemptId, num_tokens: int) -> None:
        """Lets the prompt's KV up to `num_tokens` land; the whole prompt ends the transfer."""
        attempt = self.attempts[attempt_id]
        prompt = attempt.request.prompt_token_ids
        self._runner.write(attempt.block_ids or (), prompt[:num_tokens], start=attempt.num_cached_tokens)
        attempt.num_landed_tokens = num_tokens
        is_last = num_tokens == len(prompt)
        attempt.is_quiesced = is_last
        self._tell(KVLanded(attempt_id, num_tokens, is_last))

    def send_first_tokens(self, attempt_id: AttemptId) -> tuple[SampledToken, ...]:
        """Delivers each choice's first token, which the client is taken to have from now on; returns them."""
        attempt = self.attempts[attempt_id]
        attempt.has_sent_tokens = True
        tokens = tuple(expected_tokens(attempt.request, choice)[0] for choice in attempt.request.choices)
        self._tell(KVFirstTokens(attempt_id, tokens))
        return tokens

    def fail(self, attempt_id: AttemptId, error: StaffettaError | None = None) -> None:
        """Lets the attempt bring nothing more."""
        self.attempts[attempt_id].is_over = True
        self._tell(KVFailed(attempt_id, error))

    def quiesce(self, attempt_id: AttemptId) -> None:
        """Ends the reads of an attempt that ended early."""
        self.attempts[attempt_id].is_quiesced = True
        self._tell(KVQuiesced(attempt_id))

    def _tell(self, event: KVEvent) -> None:
        self._events.append(event)
        self._on_news()
