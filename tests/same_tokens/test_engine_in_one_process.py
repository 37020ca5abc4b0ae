"""Requests of every kind through the engine of one process: the same bits alone, together, chunked, cached, preempted.

Token ids and float32 log-probabilities, of choices and prompts, the chosen and the alternatives, are compared for
equality. Every variant proves from the steps it ran that its condition occurred.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine.request import Request
from kernels.backend import WeightFormat
from kvtransfer.layout import KVDtype
from tests.same_tokens.asking import draw_requests
from tests.same_tokens.models import ODD, make_biased_model, make_odd_model
from tests.same_tokens.one_process import BLOCK_SIZE, Bits, make_request, make_runner, run, without_logprobs

FEW_BLOCKS = 21
SEED = 48


def num_copies(requests: Sequence[Request], bits: Bits) -> int:
    """Blocks to be copied: one less than choices with a second token, where a prompt's last block is not full."""
    num_going_on = [sum(len(bits[each.request_id, choice]) > 2 for choice in each.choices) for each in requests]
    return sum(
        max(0, num - 1)
        for each, num in zip(requests, num_going_on, strict=True)
        if len(each.prompt_token_ids) % BLOCK_SIZE
    )


FAMILIES: dict[str, tuple[Callable[..., Path], KVDtype, WeightFormat]] = {
    "float32": (make_odd_model, "float32", WeightFormat.AS_GIVEN),
    "bfloat16": (make_biased_model, "bfloat16", WeightFormat.AS_GIVEN),
    "int8": (make_biased_model, "float32", WeightFormat.INT8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_have_the_same_bits_however_they_are_computed(tmp_path: Path, family: str) -> None:
    make_model, dtype, stored = FAMILIES[family]
    model = make_model(tmp_path, seed=4)
    asked = draw_requests(12, seed=SEED, vocab_size=ODD.vocab_size, max_prompt_tokens=300)
    requests = [make_request(each, number, range(each.num_choices)) for number, each in enumerate(asked)]
    each_choice = [
        make_request(each, number, (choice,)) for number, each in enumerate(asked) for choice in range(each.num_choices)
    ]
    threads_before = torch.get_num_threads()
    runner = make_runner(model, dtype, stored, threads=1)
    alone: Bits = {}
    for request in each_choice:
        alone |= run(runner, [request], max_batch_tokens=2048).bits
    assert set(runner.num_slices) == {1}, "every choice was alone"
    assert max(runner.longest) == 300, "prompts were computed whole"
    num_copied = num_copies(requests, alone)
    for threads, max_batch_tokens in ((1, 2048), (2, 16), (3, 64)):
        other = make_runner(model, dtype, stored, threads=threads)
        together = run(other, requests, max_batch_tokens=max_batch_tokens)
        assert together.bits == alone
        assert max(other.num_slices) > 4, "requests shared a step"
        assert max(other.longest) <= max_batch_tokens
        assert together.num_copied_blocks == other.num_copies == num_copied > 5
    cached = run(runner, requests, max_batch_tokens=64, prefix_caching=True)
    assert cached.bits == alone
    assert cached.num_cached_tokens > 200
    preempted = run(runner, requests, max_batch_tokens=64, num_blocks=FEW_BLOCKS)
    assert preempted.bits == alone
    assert preempted.num_preempted_forks > 0
    assert preempted.num_copied_blocks > 0
    ahead = make_runner(model, dtype, stored, threads=2)
    together_ahead, *alone_ahead = [
        [without_logprobs(each) for each in group if not each.sampling.is_penalised]
        for group in (requests, *([each] for each in each_choice))
    ]
    for group in (together_ahead, *alone_ahead):
        assert run(ahead, group, max_batch_tokens=64).bits == run(runner, group, max_batch_tokens=64).bits
    assert ahead.num_ahead > 60 and runner.num_ahead == 0
    torch.set_num_threads(threads_before)


def test_the_requests_are_of_every_kind() -> None:
    asked = draw_requests(12, seed=SEED, vocab_size=ODD.vocab_size, max_prompt_tokens=300)
    sampling = [each.sampling for each in asked]
    assert {each.num_choices for each in asked} == {1, 2, 3, 4}
    assert {each["temperature"] > 0 for each in sampling} == {False, True}
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_logprobs"):
        assert {penalty in each for each in sampling} == {False, True}
    assert {bool(each["stop_token_ids"]) for each in sampling} == {False, True}
    assert sum(len(each.token_ids) > 3 * 64 for each in asked) >= 2
    assert min(len(each.token_ids) for each in asked) == 1
