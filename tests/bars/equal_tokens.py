"""Bar: where a prompt was prefilled does not show in its tokens.

Prompts of 1 to 1,500 tokens, random and natural, greedy: the tokens of prefill → decode equal those of one process that
does everything, one request at a time and eight at a time, and so does every bit of their log-probabilities.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.bars.concurrent import run_all
from tests.bars.report import parse_size, print_table, verdict
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import MAX_PROMPT_TOKENS, Prompt, token_prompts
from tests.e2e.reflected import ReflectedClient, greedy
from tests.loop import run

SINGLE: Final = ("--prefill", "0", "--decode", "1", "--threads", "1")
RELAY: Final = ("--prefill", "1", "--decode", "1", "--threads", "1", "--no-local-prefill")
NO_CACHE: Final = "--no-prefix-caching"
"""The same prompts run twice; a prefix hit in the second run would leave nothing to hand over."""

_MAX_TOKENS: Final = 24
_NUM_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers beside those of the single process."""

    answers: Sequence[Answer]
    expected: Sequence[Answer]

    @property
    def num_different(self) -> int:
        """Requests with at least one other token."""
        return sum(a.token_ids != e.token_ids for a, e in zip(self.answers, self.expected, strict=True))

    @property
    def num_different_bits(self) -> int:
        """Requests with at least one other log-probability."""
        return sum(a.logprobs != e.logprobs for a, e in zip(self.answers, self.expected, strict=True))

    @property
    def num_handed_over(self) -> int:
        """Requests none of whose prompt was prefilled on the decode worker."""
        handoffs = [answer.handoff for answer in self.answers]
        return sum(bool(h.prefill_worker) and not h.locally_prefilled_tokens for h in handoffs)


async def generate_all(cluster: Cluster, prompts: Sequence[Prompt], *, num_at_once: int) -> list[Answer]:
    """Greedy tokens after every prompt."""
    async with ReflectedClient(cluster.grpc) as client:

        async def generate(prompt: Prompt) -> Answer:
            return await client.generate(
                tokens={"token_ids": prompt.token_ids}, sampling=greedy(_MAX_TOKENS, logprobs=0)
            )

        return await run_all(prompts, generate, num_at_once=num_at_once)


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=40, full=200)
    prompts = token_prompts(size.count, seed=size.seed, min_tokens=1, max_tokens=MAX_PROMPT_TOKENS)
    with Cluster(*SINGLE, NO_CACHE) as single:
        print(single.command)
        expected = run(generate_all(single, prompts, num_at_once=1))
        own = Comparison(run(generate_all(single, prompts, num_at_once=_NUM_AT_ONCE)), expected)
    with Cluster(*RELAY, NO_CACHE) as relay:
        print(relay.command)
        compared = {
            num_at_once: Comparison(run(generate_all(relay, prompts, num_at_once=num_at_once)), expected)
            for num_at_once in (1, _NUM_AT_ONCE)
        }
    rows: list[list[object]] = [
        ["one process", _NUM_AT_ONCE, len(prompts), own.num_handed_over, own.num_different, own.num_different_bits]
    ]
    failures: list[str] = []
    for num_at_once, comparison in compared.items():
        handed_over, different = comparison.num_handed_over, comparison.num_different
        rows.append(
            ["prefill → decode", num_at_once, len(prompts), handed_over, different, comparison.num_different_bits]
        )
        if different:
            failures.append(f"{different} of {len(prompts)} requests have other tokens, {num_at_once} at a time")
        if comparison.num_different_bits:
            failures.append(
                f"{comparison.num_different_bits} requests have other log-probabilities, {num_at_once} at a time"
            )
        if handed_over != len(prompts):
            failures.append(f"only {handed_over} of {len(prompts)} prompts were handed over, {num_at_once} at a time")
    headers = ("system", "at a time", "prompts", "handed over", "other tokens", "other logprob bits")
    print_table(f"against one process, one at a time, seed {size.seed}", headers, rows)
    return verdict(failures)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
