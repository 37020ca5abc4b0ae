"""What was asked, and what comes back: the frozen values that cross the engine's boundary. No torch."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, NewType

from kvtransfer.layout import BlockId
from staffetta.errors import StaffettaError
from staffetta.hashing import BlockHash

RequestId = NewType("RequestId", str)


class RequestKind(Enum):
    """How far the engine takes a request."""

    GENERATE = "generate"
    """To its last token."""
    PREFILL = "prefill"
    """To its first token; then the blocks are held until released."""


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, fully resolved: no field is left to a default of somebody else.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep everything. `seed` keys the counter-based random numbers.
    `stop_token_ids` already contains the model's end-of-sequence tokens unless the request ignores them.
    `num_logprobs` None asks for none, 0 for the chosen token's alone, n for n alternatives as well;
    `num_prompt_logprobs` means the same of the prompt's tokens. `repetition_penalty` 1 and the other penalties 0 change
    nothing; penalties count token ids alone: repetition those of prompt and output, the others those of the output.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    num_logprobs: int | None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_prompt_logprobs: int | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether the choice of a token depends on the tokens before it other than through the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def finish_reason(self, token: "SampledToken") -> FinishReason | None:
        """Why a choice ends with `token`; None when it goes on."""
        if token.token_id in self.stop_token_ids and token.index >= self.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if token.index + 1 >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as the engine sees it. Immutable; progress lives in the engine's `Sequence`.

    `prompt_token_ids` includes tokens generated before a restart, `first_token_index` of them; output positions (and so
    random numbers, token indices, `max_tokens`, `min_tokens`) go on from there. `choices` are the indices of the
    continuations wanted, rising, at least one; each keys random numbers of its own, and after a restart there is one.
    `credit` is how many tokens each choice may produce before a grant; None means unbounded. `cache_salt` roots the
    block-hash chain. `arrival` orders requests of equal `priority`: a counter that only grows.
    """

    request_id: RequestId
    kind: RequestKind
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival: int
    cache_salt: bytes = b""
    priority: int = 0
    credit: int | None = None
    first_token_index: int = 0
    choices: tuple[int, ...] = (0,)

    @property
    def num_places(self) -> int:
        """What it counts where requests are counted: each choice one; a prefill, one sequence for all choices, one."""
        return 1 if self.kind is RequestKind.PREFILL else len(self.choices)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One generated token. `index` counts output positions from 0. Log-probabilities are natural, float32 values."""

    index: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A prompt's token with its log-probability, given the tokens before it. Positions count from 0, which has none."""

    position: int
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class FinalBlock:
    """A block of a PREFILL request whose bytes will not change while it is held.

    `chain_hash` is None for a prompt's last block when it is not full (`num_tokens` < block size).
    """

    block_id: BlockId
    block_index: int
    num_tokens: int
    generation: int
    chain_hash: BlockHash | None


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """What one choice cost. Durations in seconds, counts in tokens.

    What happened before the choices of a request went apart, each of them tells as its own.
    `queue_s`: arrival to first computation. `prefill_s`: first computation to first token. `num_cached_tokens`:
    prompt tokens taken from the local prefix cache at first. `num_recomputed_tokens`: tokens computed a second time
    after preemption.
    """

    num_cached_tokens: int
    num_local_prompt_tokens: int
    num_recomputed_tokens: int
    num_preemptions: int
    queue_s: float
    prefill_s: float


class SequenceOutput(NamedTuple):
    """One choice's news of one step. `stats` is set when it finished (GENERATE) or produced its token (PREFILL).

    `tokens` are the choice's next ones; of a PREFILL, which has one output for all, the first of every choice, in the
    order of the request's choices. `prompt_tokens` follow those of earlier outputs without a gap, from position 1 on;
    they come with the first choice that is open.
    """

    request_id: RequestId
    choice_index: int = 0
    tokens: tuple[SampledToken, ...] = ()
    prompt_tokens: tuple[PromptToken, ...] = ()
    final_blocks: tuple[FinalBlock, ...] = ()
    finish_reason: FinishReason | None = None
    error: StaffettaError | None = None
    stats: SequenceStats | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All news of one step, in the order of the batch."""

    step: int
    outputs: tuple[SequenceOutput, ...]
