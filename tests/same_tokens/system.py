"""Bar: tokens and log-probabilities have the same bits in every way in which the system can run a request.

Greedy and seeded requests over prompts of 1 to 1,500 tokens. The reference is each request alone, in one process on one
thread, its prompt in one step. Every way proves by the system's own counts that its condition occurred.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.bars.equal_tokens import NO_CACHE, RELAY, SINGLE
from tests.bars.report import parse_size, print_table, verdict
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import MAX_PROMPT_TOKENS
from tests.loop import run
from tests.same_tokens import ways
from tests.same_tokens.asking import Asked, TokenBits, draw_requests, first_difference
from tests.same_tokens.observed import MANY
from tests.same_tokens.ways import Site, Taken, Way

WHOLE_PROMPTS: Final = ("--max-batch-tokens", "2048")
BFLOAT16: Final = ("--dtype", "bfloat16")
FEW_BLOCKS: Final = ("--block-size", "4", "--num-blocks", "44")
UNCACHED_DECODE: Final = {"STAFFETTA_DECODE_PREFIX_CACHING": "false"}
OWN_THREADS: Final = ("--prefill", "1", "--decode", "1", "--no-local-prefill", NO_CACHE)


@dataclass(frozen=True, slots=True)
class Setup:
    """One system and the ways taken in it, in order."""

    flags: Sequence[str]
    ways: Sequence[Way]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one way brought, beside the reference."""

    way: Way
    system: str
    num_tokens: int
    taken: Taken
    difference: str | None

    @property
    def failures(self) -> list[str]:
        """What is wrong: another bit, or a condition that did not occur."""
        found = [f"{self.way.name} ({self.system}): {self.difference}"] if self.difference else []
        if self.taken.num_occurred < max(1, self.taken.num_demanded):
            found.append(
                f"{self.way.name} ({self.system}): {self.taken.num_occurred} {self.way.condition}, "
                f"at least {max(1, self.taken.num_demanded)} were to be"
            )
        return found


REFERENCE: Final = (*SINGLE, NO_CACHE, *WHOLE_PROMPTS)
SETUPS: Final = (
    *(Setup((*SINGLE, NO_CACHE, "--max-batch-tokens", str(n)), (ways.cut_by(n), ways.MIXED)) for n in (16, 64, 512)),
    Setup((*SINGLE[:-1], "2", NO_CACHE, *WHOLE_PROMPTS), (ways.THREADED,)),
    Setup((*SINGLE[:-1], "2"), (ways.PARTIAL_HIT, ways.FULL_HIT)),
    Setup((*SINGLE, NO_CACHE, *FEW_BLOCKS), (ways.PREEMPTED,)),
    Setup((*RELAY, NO_CACHE, *FEW_BLOCKS), (ways.PREEMPTED,)),
    *(
        Setup(
            (*RELAY, NO_CACHE, "--transports", transport),
            (
                ways.handing_over(transport, num_at_once=1),
                ways.handing_over(transport, num_at_once=MANY),
                ways.restarting("restarted with a hand-off", num_at_once=4, transport=transport),
            ),
        )
        for transport in ("shm", "tcp")
    ),
    *(
        Setup(
            OWN_THREADS,
            (ways.handing_over_threaded(prefill=prefill, decode=decode),),
            {"STAFFETTA_PREFILL_THREADS": str(prefill), "STAFFETTA_DECODE_THREADS": str(decode)},
        )
        for prefill, decode in ((1, 2), (2, 1))
    ),
    Setup(RELAY, (ways.PREFILL_HIT,), UNCACHED_DECODE),
    Setup(RELAY, (ways.HIT_AND_HANDOFF,)),
)
BFLOAT16_SETUPS: Final = (
    Setup((*SINGLE, NO_CACHE, *BFLOAT16, "--max-batch-tokens", "64"), (ways.cut_by(64), ways.MIXED)),
    Setup((*SINGLE, *BFLOAT16), (ways.PARTIAL_HIT,)),
    Setup((*RELAY, NO_CACHE, *BFLOAT16), (ways.handing_over("shm", num_at_once=MANY),)),
)


def take_all(
    reference: Sequence[str], setups: Sequence[Setup], requests: Sequence[Asked], *, own: Sequence[Way]
) -> list[Finding]:
    """Every way of `setups` beside a system with the flags `reference`, in which the ways `own` are taken as well."""
    with Cluster(*reference) as cluster:
        first = run(ways.REFERENCE.take(Site(cluster, requests, ())))
        expected = first.outputs
        findings = [_finding(ways.REFERENCE, cluster, first, None)]
        findings += [_take(way, cluster, requests, expected) for way in own]
    for setup in setups:
        with Cluster(*setup.flags, environ=setup.environ) as cluster:
            cluster.wait_until_linked()
            findings += [_take(way, cluster, requests, expected) for way in setup.ways]
    return findings


def _take(way: Way, cluster: Cluster, requests: Sequence[Asked], expected: Sequence[Sequence[TokenBits]]) -> Finding:
    fitting = [n for n, asked in enumerate(requests) if len(asked.token_ids) <= way.max_prompt_tokens] * way.num_copies
    asked, outputs = [requests[n] for n in fitting], [expected[n] for n in fitting]
    taken = run(way.take(Site(cluster, asked, outputs)))
    return _finding(way, cluster, taken, first_difference(asked, taken.outputs, outputs))


def _finding(way: Way, cluster: Cluster, taken: Taken, difference: str | None) -> Finding:
    settings = [f"{name}={value}" for name, value in cluster.environ.items()]
    system = " ".join([*settings, *cluster.flags])
    finding = Finding(way, system, sum(map(len, taken.outputs)), taken, difference)
    print(f"{way.name}: {'; '.join(finding.failures) or 'same'}", file=sys.stderr, flush=True)
    return finding


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=24, full=100)
    requests = draw_requests(size.count, seed=size.seed, max_prompt_tokens=MAX_PROMPT_TOKENS)
    own = (ways.BATCHED, ways.restarting("restarted in one process", num_at_once=4))
    findings = take_all(REFERENCE, SETUPS, requests, own=own)
    findings += take_all((*REFERENCE, *BFLOAT16), BFLOAT16_SETUPS, requests, own=own)
    rows = [
        [
            found.way.name,
            found.system,
            len(found.taken.outputs),
            found.num_tokens,
            found.taken.num_occurred,
            found.way.condition,
            found.difference or "none",
        ]
        for found in findings
    ]
    headers = ("way", "system", "requests", "tokens", "times", "condition", "first difference")
    print_table(f"bits of tokens and log-probabilities beside the reference, seed {size.seed}", headers, rows)
    return verdict([failure for found in findings for failure in found.failures])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
