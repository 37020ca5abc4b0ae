"""Bar: what was handed over is what answers.

Held-out recall prompts of up to 1,500 tokens, every one prefilled elsewhere (`--no-local-prefill`), half over REST and
half over gRPC: at least 97 % exact answers over shm and over tcp, and every answer reports at least the bytes of its
prompt's full blocks over the transport that was demanded. The control zeroes pulled KV: exact answers must fall below
10 %, or the first figure says nothing about the hand-off.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from demo.corpus import RecallSample
from tests.bars.concurrent import run_all
from tests.bars.report import parse_size, print_table, verdict
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster, block_bytes
from tests.e2e.prompts import recall_prompts
from tests.e2e.reflected import ReflectedClient
from tests.e2e.rest import chat, chat_streamed, open_rest
from tests.loop import run

LEAST_EXACT: Final = 0.97
MOST_EXACT_WITHOUT_KV: Final = 0.10
FLAGS: Final = ("--prefill", "2", "--decode", "2", "--no-local-prefill")
ZEROED: Final = ("--decode-failpoints", "handoff.zero_pulled_kv:on:1")

_MAX_TOKENS: Final = 12
_NUM_AT_ONCE: Final = 4
_CONTROL_SHARE: Final = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and its answer."""

    door: str
    expected: str
    answer: Answer

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the stated code and nothing else."""
        return self.answer.text.strip() == self.expected


@dataclass(slots=True)
class Recall:
    """What one cluster answered."""

    transport: str
    command: str
    block_size: int
    block_bytes: int
    asked: list[Asked] = field(default_factory=list)

    @property
    def exact(self) -> float:
        """Share of exact answers."""
        return sum(asked.is_exact for asked in self.asked) / len(self.asked)

    def violations(self) -> list[str]:
        """Answers whose report does not show that the whole prompt was handed over as demanded."""
        found: list[str] = []
        for asked in self.asked:
            handoff = asked.answer.handoff
            least = asked.answer.prompt_tokens // self.block_size * self.block_bytes
            if handoff.handoff_bytes < least:
                found.append(f"{handoff.handoff_bytes} bytes for {asked.answer.prompt_tokens} tokens, {least} expected")
            if handoff.transport != self.transport:
                found.append(f"moved over {handoff.transport!r}, {self.transport!r} was demanded")
            if not handoff.prefill_worker or handoff.locally_prefilled_tokens:
                found.append(f"{handoff.locally_prefilled_tokens} tokens were prefilled on {handoff.decode_worker}")
        return found


async def ask_all(cluster: Cluster, samples: Sequence[RecallSample]) -> list[Asked]:
    """Asks over REST streamed, gRPC, REST whole, gRPC, and so on."""
    rest = open_rest(cluster.http)
    async with ReflectedClient(cluster.grpc) as grpc_client, rest:

        async def ask(numbered: tuple[int, RecallSample]) -> Asked:
            index, sample = numbered
            if index % 4 == 0:
                return Asked("REST", sample.answer, await chat(rest, sample.prompt, max_tokens=_MAX_TOKENS))
            if index % 4 == 2:
                streamed = await chat_streamed(rest, sample.prompt, max_tokens=_MAX_TOKENS)
                return Asked("REST stream", sample.answer, streamed)
            answer = await grpc_client.generate(
                chat={"messages": [{"role": "user", "content": sample.prompt}]},
                sampling={"temperature": 0.0, "max_tokens": _MAX_TOKENS},
            )
            return Asked("gRPC", sample.answer, answer)

        return await run_all(list(enumerate(samples)), ask, num_at_once=_NUM_AT_ONCE)


def measure(transport: str, samples: Sequence[RecallSample], *flags: str) -> Recall:
    """Asks every question of a fresh cluster whose only transport is `transport`."""
    with Cluster(*FLAGS, "--transports", transport, *flags) as cluster:
        layout = next(iter(cluster.workers().values())).announcement.identity.layout
        recall = Recall(transport, cluster.command, layout.groups[0].block_size, block_bytes(layout))
        recall.asked = run(ask_all(cluster, samples))
    return recall


def rows_of(recall: Recall, note: str) -> list[list[object]]:
    """A line for each door and prompt length."""
    rows: list[list[object]] = []
    for door in ("REST", "REST stream", "gRPC"):
        asked = [asked for asked in recall.asked if asked.door == door]
        if asked:
            rows.append([recall.transport + note, door, len(asked), *_figures(asked)])
    for low, high in ((1, 500), (501, 1000), (1001, 1500)):
        asked = [asked for asked in recall.asked if low <= asked.answer.prompt_tokens <= high]
        if asked:
            rows.append([recall.transport + note, f"{low} to {high} tokens", len(asked), *_figures(asked)])
    return rows


def _figures(asked: Sequence[Asked]) -> tuple[str, int, int]:
    exact = sum(one.is_exact for one in asked)
    tokens = statistics.median(one.answer.prompt_tokens for one in asked)
    return f"{exact / len(asked):.1%}", int(tokens), sum(one.answer.handoff.handoff_bytes for one in asked)


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=40, full=300)
    samples = recall_prompts(size.count, seed=size.seed)
    failures: list[str] = []
    rows: list[list[object]] = []
    for transport in ("shm", "tcp"):
        recall = measure(transport, samples)
        print(recall.command)
        rows += rows_of(recall, "")
        failures += recall.violations()
        if recall.exact < LEAST_EXACT:
            failures.append(f"{transport}: {recall.exact:.1%} exact, at least {LEAST_EXACT:.0%} demanded")
    control = measure("shm", samples[:: max(1, min(_CONTROL_SHARE, len(samples) // 20))], *ZEROED)
    print(control.command)
    rows += rows_of(control, ", zeroed")
    if control.exact >= MOST_EXACT_WITHOUT_KV:
        failures.append(f"with zeroed KV {control.exact:.1%} are exact, below {MOST_EXACT_WITHOUT_KV:.0%} demanded")
    headers = ("transport", "door or length", "prompts", "exact", "median tokens", "bytes moved")
    print_table(f"recall, seed {size.seed}", headers, rows)
    return verdict(failures)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
