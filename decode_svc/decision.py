"""Decides who computes a prompt: this decode worker, or which prefill worker. A pure function of what is known."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from staffetta.errors import HandoffFailedError


@dataclass(frozen=True, slots=True)
class PrefillPolicy:
    """The worker's settings `local_prefill`, `local_prefill_max_tokens` and `max_handoff_attempts`; see the schema."""

    local_prefill: Literal["auto", "never"]
    local_prefill_max_tokens: int
    max_attempts: int


@dataclass(frozen=True, slots=True)
class PeerView:
    """A prefill worker with a working session, and how many hand-offs it runs for us."""

    worker_id: str
    num_handoffs: int


def choose_prefill(
    policy: PrefillPolicy,
    *,
    num_missing_tokens: int,
    preferred: str,
    peers: Sequence[PeerView],
    tried: Collection[str],
    num_attempts: int,
) -> str | None:
    """The prefill worker to ask, or None to compute here.

    1. Short: at most `local_prefill_max_tokens` are missing, and computing here is allowed - here.
    2. The preferred peer, unless it failed this request already.
    3. The least loaded peer that has not failed this request; ties go to the lower id.
    4. Nobody is left: here if allowed; else the least loaded peer again, until the attempts are used up.

    Raises HandoffFailedError when nobody may compute the prompt.
    """
    may_compute_here = policy.local_prefill == "auto"
    if may_compute_here and num_missing_tokens <= policy.local_prefill_max_tokens:
        return None
    if num_attempts < policy.max_attempts:
        untried = [peer for peer in peers if peer.worker_id not in tried]
        if any(peer.worker_id == preferred for peer in untried):
            return preferred
        candidates = untried if untried or may_compute_here else peers
        if candidates:
            return min(candidates, key=lambda peer: (peer.num_handoffs, peer.worker_id)).worker_id
    if may_compute_here:
        return None
    raise HandoffFailedError(
        f"{num_attempts} hand-offs of this request failed, {len(peers)} prefill workers are reachable, and this decode "
        f"worker may not prefill (local_prefill is never); retry later"
    )
