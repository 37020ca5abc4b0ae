"""Requests of every kind through the engine of one process: the same bits alone, together, chunked, cached, preempted.

Token ids and float32 log-probabilities, of choices and prompts, the chosen and the alternatives, are compared for
equality. Every variant proves from the steps it ran that its condition occurred.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.model_config import ModelConfig
from engine.request import Request, RequestId, RequestKind, SequenceOutput
from engine.runner import ModelRunner, load_runner
from engine.step import Following, SequenceSlice, SliceResult, StepInFlight
from kernels.backend import WeightFormat
from kvtransfer.layout import KVDtype
from staffetta.hashing import BlockHasher
from staffetta.v1 import common_pb2
from tests.engine.making import make_limits, run_choices
from tests.same_tokens.asking import Asked, draw_requests
from tests.same_tokens.models import ODD, make_biased_model, make_odd_model
from worker.codec import sampling_from_proto

BLOCK_SIZE, NUM_BLOCKS, FEW_BLOCKS = 16, 400, 21
SEED = 48
EOS = (2,)
Bits = dict[tuple[str, int], list[str]]
"""By request and choice: its tokens, then the reason of its end; those of the prompt are under choice -1."""


class CountingRunner:
    """A runner that keeps the number of sequences, the longest slice and the copies of every step."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.num_slices: list[int] = []
        self.longest: list[int] = []
        self.num_copies = self.num_ahead = 0

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        self._count(slices)
        return self._runner.run(slices)

    @property
    def can_begin(self) -> bool:
        return self._runner.can_begin

    def begin(self, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        step = self._runner.begin(slices, follows=follows)
        if step is not None:
            self._count(slices)
            self.num_ahead += follows is not None
        return step

    def hold(self) -> None:
        self._runner.hold()

    def go_on(self) -> None:
        self._runner.go_on()

    def _count(self, slices: tuple[SequenceSlice, ...]) -> None:
        self.num_slices.append(len(slices))
        self.longest.append(max(len(part.token_ids) for part in slices))
        self.num_copies += sum(part.copy is not None for part in slices)


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of some requests, and what the engine told of how."""

    bits: Bits
    num_cached_tokens: int
    num_preempted_forks: int
    num_copied_blocks: int


def make_runner(model: Path, dtype: KVDtype, stored: WeightFormat, *, threads: int) -> CountingRunner:
    config = ModelConfig.from_directory(model)
    layout = config.kv_layout(block_size=BLOCK_SIZE, dtype=dtype, model_digest="odd")
    pool = memoryview(bytearray(layout.page_bytes * NUM_BLOCKS))
    return CountingRunner(
        load_runner(
            model,
            config,
            layout,
            pool=pool,
            num_blocks=NUM_BLOCKS,
            threads=threads,
            device="cpu",
            quantization=stored.value,
        )
    )


def make_request(asked: Asked, number: int, choices: Sequence[int]) -> Request:
    sampling = sampling_from_proto(common_pb2.SamplingParams(**asked.sampling), eos_token_ids=EOS)
    return Request(
        RequestId(f"r{number}"),
        RequestKind.GENERATE,
        asked.token_ids,
        sampling,
        arrival=number,
        choices=tuple(choices),
    )


def run(
    runner: CountingRunner,
    requests: Sequence[Request],
    *,
    max_batch_tokens: int,
    num_blocks: int = NUM_BLOCKS,
    prefix_caching: bool = False,
) -> Ran:
    """Runs the requests together; with a prefix cache after others that leave the same prompts in it."""
    limits = make_limits(
        max_batch_tokens=max_batch_tokens, max_sequences=16, max_model_len=2000, prefix_caching=prefix_caching
    )
    hasher = BlockHasher(b"k" * 16, block_size=BLOCK_SIZE)
    engine = Engine(runner, num_blocks=num_blocks, hasher=hasher, limits=limits)
    if prefix_caching:
        for request in requests:
            engine.add(request)
        run_choices(engine, max_steps=2000)
    num_copied = engine.counts().num_copied_blocks
    for request in requests:
        engine.add(request)
    outputs = run_choices(engine, max_steps=2000)
    return _ran(outputs, engine.counts().num_copied_blocks - num_copied)


def _ran(outputs: dict[tuple[str, int], list[SequenceOutput]], num_copied_blocks: int) -> Ran:
    ends = {key: each[-1] for key, each in outputs.items()}
    stats = {key: end.stats for key, end in ends.items() if end.stats is not None}
    assert stats.keys() == outputs.keys(), "every choice ended"
    least: dict[str, int] = {}
    for (name, _), stat in stats.items():
        least[name] = min(stat.num_preemptions, least.get(name, stat.num_preemptions))
    return Ran(
        bits=_bits_of(outputs),
        num_cached_tokens=sum(stat.num_cached_tokens for stat in stats.values()),
        num_preempted_forks=sum(stat.num_preemptions > least[name] for (name, _), stat in stats.items()),
        num_copied_blocks=num_copied_blocks,
    )


def _bits_of(outputs: dict[tuple[str, int], list[SequenceOutput]]) -> Bits:
    """Every token as Python writes it: equal text is equal bits, the sign of 0 included."""
    bits: Bits = {}
    for (name, choice), each in outputs.items():
        tokens = [repr(token) for output in each for token in output.tokens]
        bits[name, choice] = [*tokens, str(each[-1].finish_reason)]
        bits.setdefault((name, -1), []).extend(repr(token) for output in each for token in output.prompt_tokens)
    return bits


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


def without_logprobs(request: Request) -> Request:
    """Steps of such requests are begun ahead, where there are threads for that."""
    return replace(request, sampling=replace(request.sampling, num_logprobs=None, num_prompt_logprobs=None))


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
