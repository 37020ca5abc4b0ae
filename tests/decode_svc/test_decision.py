"""Who computes a prompt: the four rules of `choose_prefill`, over every case of a small world."""

from itertools import combinations, product
from typing import Literal

import pytest

from decode_svc.decision import PeerView, PrefillPolicy, choose_prefill
from staffetta.errors import HandoffFailedError

IDS = ("p0", "p1", "p2")
LOADS = (0, 1)


def make_peers() -> list[tuple[PeerView, ...]]:
    """Every set of at most three peers with every load."""
    return [
        tuple(PeerView(worker_id, load) for worker_id, load in zip(chosen, loads, strict=True))
        for size in range(len(IDS) + 1)
        for chosen in combinations(IDS, size)
        for loads in product(LOADS, repeat=size)
    ]


def by_the_rules(
    policy: PrefillPolicy,
    num_missing_tokens: int,
    preferred: str,
    peers: tuple[PeerView, ...],
    tried: frozenset[str],
    num_attempts: int,
) -> str | None:
    """The docstring's rules one by one; raises LookupError where nobody may compute the prompt."""
    is_allowed_here = policy.local_prefill == "auto"
    has_attempts = num_attempts < policy.max_attempts
    untried = {peer.worker_id: peer.num_handoffs for peer in peers if peer.worker_id not in tried}
    if num_missing_tokens <= policy.local_prefill_max_tokens and is_allowed_here:
        return None  # 1
    if has_attempts and preferred in untried:
        return preferred  # 2
    if has_attempts and untried:
        return min(sorted(untried), key=lambda worker_id: untried[worker_id])  # 3
    if is_allowed_here:
        return None  # 4
    if has_attempts and peers:
        return sorted(peers, key=lambda peer: (peer.num_handoffs, peer.worker_id))[0].worker_id
    raise LookupError


@pytest.mark.parametrize("local_prefill", ["auto", "never"])
def test_every_case_is_decided_by_the_four_rules(local_prefill: Literal["auto", "never"]) -> None:
    policy = PrefillPolicy(local_prefill, local_prefill_max_tokens=32, max_attempts=2)
    tried_sets = [frozenset(tried) for size in range(4) for tried in combinations(IDS, size)]
    num_cases = 0
    for missing, preferred, peers, tried, attempts in product(
        (0, 32, 33), ("", *IDS), make_peers(), tried_sets, range(4)
    ):
        case = (policy, missing, preferred, peers, tried, attempts)
        try:
            expected: str | type[HandoffFailedError] | None = by_the_rules(*case)
        except LookupError:
            expected = HandoffFailedError
        try:
            decided: str | type[HandoffFailedError] | None = choose_prefill(
                policy,
                num_missing_tokens=missing,
                preferred=preferred,
                peers=peers,
                tried=tried,
                num_attempts=attempts,
            )
        except HandoffFailedError:
            decided = HandoffFailedError
        assert decided == expected, case
        num_cases += 1
    assert num_cases == 3 * 4 * 27 * 8 * 4


def test_a_refusal_is_retryable_and_says_what_was_tried() -> None:
    with pytest.raises(HandoffFailedError) as raised:
        choose_prefill(
            PrefillPolicy("never", 32, 3),
            num_missing_tokens=10,
            preferred="",
            peers=(PeerView("p0", 0),),
            tried={"p0"},
            num_attempts=3,
        )
    assert raised.value.is_retryable
    assert raised.value.message == (
        "3 hand-offs of this request failed, 1 prefill workers are reachable, and this decode worker may not prefill "
        "(local_prefill is never); retry later"
    )
