"""Requests through the engine of this process, with counts of the steps that it ran.

A step that was begun is looked at after it has been computed: its logits tell whether they were screened.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

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
from tests.same_tokens.asking import Asked
from tests.same_tokens.bits import ChoiceBits, make_token
from worker.codec import sampling_from_proto

BLOCK_SIZE: Final = 16
NUM_BLOCKS: Final = 400
EOS: Final = (2,)

Bits = dict[tuple[str, int], list[str]]
"""By request and choice: its tokens, then the reason of its end; those of the prompt are under choice -1."""

Choices = dict[tuple[str, int], ChoiceBits]
"""By request and choice: its tokens without their log-probabilities."""

_RULED_OUT: Final = torch.finfo(torch.float32).min
"""What stands in a step's logits for one that cannot be the largest."""


class CountedStep:
    """A step in flight that is counted once it was computed."""

    def __init__(self, step: StepInFlight, count: Callable[[], None]) -> None:
        self.step = step
        self._count = count

    @property
    def is_refused(self) -> bool:
        return self.step.is_refused

    def finish(self) -> Sequence[SliceResult | None] | None:
        results = self.step.finish()
        if results is not None:
            self._count()
        return results

    def discard(self) -> None:
        self.step.discard()


class CountingRunner:
    """A runner that keeps the number of sequences, the longest slice and the copies of every step."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.num_slices: list[int] = []
        self.longest: list[int] = []
        self.num_copies = self.num_ahead = self.num_finished_ahead = 0
        self.num_finished: Counter[tuple[bool, int]] = Counter()
        """Steps that were begun and computed to their end: whether all draws are greedy, and how many there are."""
        self.num_screened: Counter[tuple[bool, int]] = Counter()
        """Of those, the ones of whose logits some were ruled out and not computed."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        self._count(slices)
        return self._runner.run(slices)

    @property
    def can_begin(self) -> bool:
        return self._runner.can_begin

    def begin(self, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        if follows is not None:
            assert isinstance(follows.step, CountedStep), "a step follows one that was begun here"
            follows = follows._replace(step=follows.step.step)
        step = self._runner.begin(slices, follows=follows)
        if step is None:
            return None
        self._count(slices)
        self.num_ahead += follows is not None
        return CountedStep(step, lambda: self._count_finished(step, slices, follows))

    def hold(self) -> None:
        self._runner.hold()

    def go_on(self) -> None:
        self._runner.go_on()

    def _count(self, slices: tuple[SequenceSlice, ...]) -> None:
        self.num_slices.append(len(slices))
        self.longest.append(max(len(part.token_ids) for part in slices))
        self.num_copies += sum(part.copy is not None for part in slices)

    def _count_finished(self, step: StepInFlight, slices: tuple[SequenceSlice, ...], follows: Following | None) -> None:
        """Counts a step before another one takes its place."""
        self.num_finished_ahead += follows is not None
        draws = [part.draw for part in slices if part.draw is not None]
        kind = all(draw.sampling.temperature == 0 for draw in draws), len(draws)
        logits = step.computing._call.results[0]  # type: ignore[attr-defined]
        self.num_finished[kind] += 1
        self.num_screened[kind] += bool((logits == _RULED_OUT).any())


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of some requests, and what the engine told of how."""

    bits: Bits
    choices: Choices
    num_cached_tokens: int
    num_preemptions: int
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
        choices={key: _choice_of(each) for key, each in outputs.items()},
        num_cached_tokens=sum(stat.num_cached_tokens for stat in stats.values()),
        num_preemptions=sum(stat.num_preemptions for stat in stats.values()),
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


def _choice_of(outputs: Sequence[SequenceOutput]) -> ChoiceBits:
    tokens = tuple(make_token(token.token_id) for output in outputs for token in output.tokens)
    return ChoiceBits(tokens, str(outputs[-1].finish_reason))


def without_logprobs(request: Request) -> Request:
    """Steps of such requests are begun ahead, where there are threads for that."""
    return replace(request, sampling=replace(request.sampling, num_logprobs=None, num_prompt_logprobs=None))
