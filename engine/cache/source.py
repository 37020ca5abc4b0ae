"""The seam through which KV comes from somewhere else: a hand-off, a host or disk tier, a remote store.

Life of one attempt, all calls on the engine thread:

1. `lookup` - the engine has matched its own prefix cache and asks whether the source will bring the rest.
2. `begin` - the engine parks the sequence (AWAITING_KV), holding nothing.
3. `poll` returns `KVReady`: bytes exist. The engine leases every block of the prompt, all or nothing, and calls
   `grant`; while it cannot, the sequence waits with nothing held.
4. `poll` returns `KVLanded` as verified tokens become contiguous; the last one ends the attempt.
   `KVFirstTokens` may come at any time after `begin`: tokens that are known (and already on their way to the client).
5. Or `poll` returns `KVFailed`: the engine keeps what landed, asks `lookup` again (which may offer another attempt or
   nothing, then the rest is computed here), and quarantines the leased blocks that had not landed.
   Or the engine calls `abandon`, because the request is gone; the leased blocks that had not landed are quarantined.
6. `KVQuiesced` - nothing touches the attempt's blocks any more; quarantined ones become free. Sent once for every
   attempt that was granted and did not land completely.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from engine.request import Request, SampledToken
from kvtransfer.layout import BlockId
from staffetta.errors import StaffettaError
from staffetta.hashing import BlockHash

AttemptId = NewType("AttemptId", int)


@dataclass(frozen=True, slots=True)
class KVReady:
    """Bytes exist and wait for blocks to go to."""

    attempt_id: AttemptId


@dataclass(frozen=True, slots=True)
class KVFirstTokens:
    """The first generated token of every choice is known. The client has them already; the engine must not emit them.

    `tokens` are in the order of the request's choices. When each ends its choice, nothing needs to land. When the
    request wants its prompt's log-probabilities, the client has been sent all of them before.
    """

    attempt_id: AttemptId
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class KVLanded:
    """KV of the first `num_tokens` tokens (counted from position 0) is verified and in the granted blocks.

    `is_last` says the attempt brought all it promised and is over.
    """

    attempt_id: AttemptId
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class KVFailed:
    """The attempt brings nothing more. `error` set means the request must end with it; None means compute or retry."""

    attempt_id: AttemptId
    error: StaffettaError | None


@dataclass(frozen=True, slots=True)
class KVQuiesced:
    """No read of the attempt touches its blocks any more."""

    attempt_id: AttemptId


KVEvent = KVReady | KVFirstTokens | KVLanded | KVFailed | KVQuiesced


@dataclass(frozen=True, slots=True)
class KVOffer:
    """What a source promises: KV for the first `num_tokens` tokens, those already cached here not counted as moved."""

    num_tokens: int


class KVSource(Protocol):
    """Brings blocks from elsewhere. Every method is called on the engine thread and must not block."""

    def lookup(self, request: Request, *, num_cached_tokens: int, num_known_tokens: int) -> KVOffer | None:
        """Decides whether to bring `request`'s prompt KV beyond `num_cached_tokens` (a multiple of the block size).

        Returns None when the engine should compute it. `num_known_tokens` exceeds the prompt when its first token came
        from a failed attempt. Raises a `StaffettaError` when the request may be served neither way.
        """

    def begin(self, attempt_id: AttemptId, request: Request, *, num_cached_tokens: int) -> None:
        """Starts bringing what `lookup` offered."""

    def grant(
        self,
        attempt_id: AttemptId,
        *,
        block_ids: tuple[BlockId, ...],
        first_block_index: int,
        chain_hashes: tuple[BlockHash, ...],
    ) -> None:
        """Hands over the leased blocks to read into, for block indices from `first_block_index` on.

        `chain_hashes` are the expected hashes of the full ones, in the same order; a block whose manifest differs is
        not to be believed.
        """

    def abandon(self, attempt_id: AttemptId) -> None:
        """Gives the attempt up; idempotent. Granted blocks stay quarantined until `KVQuiesced`."""

    def poll(self) -> Sequence[KVEvent]:
        """Returns what happened since the last call, in order. Events of unknown attempts are dropped by the engine."""
