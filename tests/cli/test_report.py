"""The words of the ready block, of the relay line and of what is still missing."""

import dataclasses
import json
from typing import Any

import pytest

from cli.client import make_answer
from cli.plan import WorkerPlan
from cli.readiness import find_missing
from cli.relay import format_bytes, relay_line
from cli.report import ReadyFacts, describe_links, describe_worker, format_count, ready_block, ready_json
from staffetta.config.schema import PrefillConfig
from tests.cli.fakes import make_finished, make_worker


def make_worker_plan(threads: int, *cpus: str) -> WorkerPlan:
    return WorkerPlan("w", "prefill", PrefillConfig(threads=threads, cpus=cpus))


ANSWER = make_answer("the answer", make_finished(), first_token_s=0.041, total_s=0.0113)

FACTS = ReadyFacts(
    version="0.1.0",
    backend="cpu (reference)",
    model="demo",
    num_parameters=3_100_000,
    is_embedded=True,
    workers=(
        describe_worker(make_worker("prefill-0"), pid=4121, ready_s=2.9, plan=make_worker_plan(2, "0-1")),
        describe_worker(make_worker("decode-0"), pid=4122, ready_s=3.04, plan=make_worker_plan(1)),
    ),
    links=tuple(describe_links(make_worker("decode-0"))),
    self_test=ANSWER,
    ready_s=3.2,
    http="127.0.0.1:8000",
    grpc="127.0.0.1:50051",
    num_cpus=2,
    cpu_quota=None,
)


def test_the_ready_block_reads_as_promised() -> None:
    assert ready_block(FACTS).splitlines() == [
        "Staffetta 0.1.0 · cpu (reference) · model demo (3.1M parameters, embedded)",
        "",
        "  prefill-0   pid 4121   ready 2.9 s    2 threads on CPU 0-1     512 KV blocks × 16 tokens     24 MiB",
        "  decode-0    pid 4122   ready 3.0 s    1 thread                 512 KV blocks × 16 tokens     24 MiB",
        "  hand-off    shared memory 6.1 GB/s · self-test through prefill-0 → decode-0 in 11 ms",
        "",
        '  REST   http://127.0.0.1:8000/v1       OpenAI style, model "demo"',
        "  gRPC   127.0.0.1:50051                grpcurl -plaintext 127.0.0.1:50051 list",
        "  stop   Ctrl-C (twice: at once)",
    ]


@pytest.mark.parametrize(
    ("quota", "lines"),
    [(1.5, ["  CPUs        1.5 of 2, by the control group's quota"]), (2.0, []), (None, [])],
)
def test_a_quota_that_bounds_is_told_below_the_workers(quota: float | None, lines: list[str]) -> None:
    block = ready_block(dataclasses.replace(FACTS, cpu_quota=quota)).splitlines()
    assert block[4:-4] == [*lines, ready_block(FACTS).splitlines()[4]]
    assert json.loads(ready_json(dataclasses.replace(FACTS, cpu_quota=quota)))["cpu_quota"] == quota


def test_the_json_says_the_same() -> None:
    ready = json.loads(ready_json(FACTS))
    assert [worker["pid"] for worker in ready["workers"]] == [4121, 4122]
    assert ready["links"][0]["bytes_per_s"] == 6.1e9


def test_several_links_share_a_line() -> None:
    links = tuple(dataclasses.replace(FACTS.links[0], bytes_per_s=rate) for rate in (5.2e9, 6.1e9))
    tcp = dataclasses.replace(FACTS.links[0], transport="tcp", bytes_per_s=2e9)
    block = ready_block(dataclasses.replace(FACTS, links=(*links, tcp)))
    assert "hand-off    shared memory 5.2–6.1 GB/s, TCP 2.0 GB/s · self-test" in block


def test_a_system_without_prefill_workers_says_so() -> None:
    alone = dataclasses.replace(ANSWER, prefill_worker="")
    block = ready_block(dataclasses.replace(FACTS, links=(), self_test=alone, is_embedded=False))
    assert "hand-off    none · self-test on decode-0 alone in 11 ms" in block
    assert "model demo (3.1M parameters)" in block


RELAYS = [
    ({}, "relay  prefill-0 → decode-0 · 1.2 MiB over shm · first token 41 ms · 2 tokens"),
    ({"handoff_bytes": 0}, "relay  prefill-0 → decode-0 · nothing to move · first token 41 ms · 2 tokens"),
    ({"prefill_worker": "", "completion_tokens": 1}, "relay  decode-0 alone · first token 41 ms · 1 token"),
    (
        {"failed_handoffs": 1, "cached_tokens": 64},
        "relay  prefill-0 → decode-0 · 1.2 MiB over shm · 1 failed hand-off · 64 of 70 prompt tokens cached · "
        "first token 41 ms · 2 tokens",
    ),
]


@pytest.mark.parametrize(("changes", "line"), RELAYS)
def test_the_relay_line_tells_how_the_prompt_travelled(changes: dict[str, Any], line: str) -> None:
    assert relay_line(dataclasses.replace(ANSWER, **changes)) == line


def test_sizes_and_counts_are_short() -> None:
    sizes = [0, 1023, 1024, 1536, 24 << 20, 3 << 30]
    assert [format_bytes(size) for size in sizes] == ["0 B", "1023 B", "1 KiB", "1.5 KiB", "24 MiB", "3 GiB"]
    counts = [999, 1_500, 3_100_000, 473_000_000, 7_200_000_000]
    assert [format_count(count) for count in counts] == ["999", "1.5k", "3.1M", "473M", "7.2B"]


def test_what_is_missing_is_named_until_nothing_is() -> None:
    prefill, decode = ("prefill-0", "prefill-1"), ("decode-0",)
    both = ("prefill-0", "prefill-1")
    registered = [make_worker("prefill-0"), make_worker("prefill-1")]
    stages = [
        ([], "prefill-0 is not registered"),
        ([make_worker("prefill-0")], "prefill-1 is not registered"),
        (registered, "decode-0 is not registered"),
        ([*registered, make_worker("decode-0", has_session=False)], "the gateway has no session to decode-0"),
        ([*registered, make_worker("decode-0", links=("prefill-0",))], "decode-0 has no link to prefill-1"),
        ([*registered, make_worker("decode-0", links=both)], None),
    ]
    assert [find_missing(w, prefill=prefill, decode=decode) for w, _ in stages] == [missing for _, missing in stages]
