"""What is handed over is what answers: short forms of the bars `recall` and `equal_tokens`."""

from collections.abc import Iterator, Sequence

import pytest

from tests.bars.equal_tokens import NO_CACHE, RELAY, SINGLE, Comparison, generate_all
from tests.bars.recall import FLAGS, ZEROED, Recall, ask_all, measure
from tests.e2e.answers import Answer
from tests.e2e.cluster import Cluster, block_bytes
from tests.e2e.prompts import Prompt, recall_prompts, token_prompts
from tests.loop import run


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return token_prompts(16, seed=5, min_tokens=1, max_tokens=700)


@pytest.fixture(scope="module")
def expected(prompts: Sequence[Prompt]) -> Iterator[list[Answer]]:
    """What one process answers on its own."""
    with Cluster(*SINGLE, NO_CACHE) as single:
        yield run(generate_all(single, prompts, num_at_once=1))


def test_tokens_and_logprobs_equal_those_of_one_process(prompts: Sequence[Prompt], expected: Sequence[Answer]) -> None:
    with Cluster(*RELAY, NO_CACHE) as relay:
        alone = Comparison(run(generate_all(relay, prompts, num_at_once=1)), expected)
        together = Comparison(run(generate_all(relay, prompts, num_at_once=8)), expected)
    assert (alone.num_handed_over, together.num_handed_over) == (len(prompts), len(prompts))
    assert (alone.num_different, together.num_different) == (0, 0)
    assert (alone.num_different_bits, together.num_different_bits) == (0, 0)


def test_zeroed_kv_changes_the_tokens(prompts: Sequence[Prompt], expected: Sequence[Answer]) -> None:
    """The control: were the handed-over KV not what answers, spoiling it would not show."""
    with Cluster(*RELAY, NO_CACHE, *ZEROED) as spoilt:
        comparison = Comparison(run(generate_all(spoilt, prompts, num_at_once=1)), expected)
    # A very short prompt says little in any case, so not all of them differ.
    assert comparison.num_different >= len(prompts) - 2


def test_zeroed_kv_drops_recall_below_a_tenth() -> None:
    """The embedded model answers from the context alone: without the KV that crossed it has nothing to answer from."""
    assert measure("shm", recall_prompts(20, seed=4), *ZEROED).exact < 0.1


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_answer_reports_all_its_bytes_over_the_transport_that_was_demanded(transport: str) -> None:
    with Cluster(*FLAGS, "--transports", transport) as cluster:
        layout = cluster.workers()["decode-0"].announcement.identity.layout
        recall = Recall(transport, cluster.command, layout.groups[0].block_size, block_bytes(layout))
        recall.asked = run(ask_all(cluster, recall_prompts(8, seed=3)))
        links = {
            name: sorted((link.prefill_worker, link.transport) for link in worker.links)
            for name, worker in cluster.workers().items()
            if name.startswith("decode")
        }
    assert recall.violations() == []
    assert recall.exact >= 0.97
    assert {asked.door for asked in recall.asked} == {"REST", "REST stream", "gRPC"}
    assert links == {name: [("prefill-0", transport), ("prefill-1", transport)] for name in ("decode-0", "decode-1")}
