"""Makes requests and engines for tests, and drives engines to the end."""

import math

from engine.engine import Engine, EngineLimits
from engine.fake import FakeRunner, FakeSource
from engine.pacing import StepPacer
from engine.request import (
    FinishReason,
    Request,
    RequestId,
    RequestKind,
    SamplingParams,
    SequenceOutput,
)
from engine.step import SequenceSlice, SliceResult
from staffetta.hashing import BlockHasher

BLOCK_SIZE = 4


def make_hasher(block_size: int = BLOCK_SIZE) -> BlockHasher:
    return BlockHasher(b"k" * 16, block_size=block_size)


def make_sampling(
    *,
    max_tokens: int = 5,
    min_tokens: int = 0,
    stop: frozenset[int] = frozenset(),
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
    presence_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
    )


_arrivals = iter(range(10**9))


def make_request(
    name: str,
    prompt: tuple[int, ...] | range = range(6),
    *,
    kind: RequestKind = RequestKind.GENERATE,
    sampling: SamplingParams | None = None,
    priority: int = 0,
    credit: int | None = None,
    first_token_index: int = 0,
    cache_salt: bytes = b"",
    choices: tuple[int, ...] = (0,),
) -> Request:
    return Request(
        request_id=RequestId(name),
        kind=kind,
        prompt_token_ids=tuple(prompt),
        sampling=sampling or make_sampling(),
        arrival=next(_arrivals),
        priority=priority,
        credit=credit,
        first_token_index=first_token_index,
        cache_salt=cache_salt,
        choices=choices,
    )


def make_prefill(
    name: str, prompt: tuple[int, ...] | range, *, priority: int = 0, choices: tuple[int, ...] = (0,)
) -> Request:
    return make_request(name, prompt, kind=RequestKind.PREFILL, priority=priority, choices=choices)


def make_limits(
    *,
    max_model_len: int = 1000,
    max_batch_tokens: int = 64,
    max_sequences: int = 8,
    max_requests: int = 100,
    prefix_caching: bool = True,
    max_slowdown: float = math.inf,
) -> EngineLimits:
    return EngineLimits(
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_requests=max_requests,
        prefix_caching=prefix_caching,
        max_slowdown=max_slowdown,
    )


def make_pacer() -> StepPacer:
    """One that bounds nothing."""
    return StepPacer(max_slowdown=math.inf, max_tokens=64)


def make_engine(
    *, num_blocks: int = 32, limits: EngineLimits | None = None, runner: FakeRunner | None = None
) -> tuple[Engine, FakeRunner]:
    runner = runner or FakeRunner(block_size=BLOCK_SIZE)
    return Engine(runner, num_blocks=num_blocks, hasher=make_hasher(), limits=limits or make_limits()), runner


def make_engine_with_source(
    *, num_blocks: int = 32, limits: EngineLimits | None = None, max_attempts: int = 3
) -> tuple[Engine, FakeRunner, FakeSource]:
    runner = FakeRunner(block_size=BLOCK_SIZE)
    source = FakeSource(runner, block_size=BLOCK_SIZE, max_attempts=max_attempts)
    engine = Engine(runner, num_blocks=num_blocks, hasher=make_hasher(), limits=limits or make_limits(), source=source)
    return engine, runner, source


def step(engine: Engine) -> dict[str, SequenceOutput]:
    """One step, with the books checked; its outputs by request."""
    output = engine.step()
    engine.check_integrity()
    if output is None:
        return {}
    by_request = {str(each.request_id): each for each in output.outputs}
    assert len(by_request) == len(output.outputs), "one output for each request and step"
    return by_request


def run_to_end(engine: Engine, *, max_steps: int = 500) -> dict[str, list[SequenceOutput]]:
    """Steps until nothing happens any more; all outputs by request."""
    collected: dict[str, list[SequenceOutput]] = {}
    for _ in range(max_steps):
        output = engine.step()
        engine.check_integrity()
        if output is None:
            return collected
        for each in output.outputs:
            collected.setdefault(str(each.request_id), []).append(each)
    raise AssertionError(f"not at rest after {max_steps} steps: {engine.counts()}")


def step_choices(engine: Engine) -> dict[tuple[str, int], SequenceOutput]:
    """One step, with the books checked; its outputs by request and choice."""
    output = engine.step()
    engine.check_integrity()
    outputs = () if output is None else output.outputs
    by_choice = {(str(each.request_id), each.choice_index): each for each in outputs}
    assert len(by_choice) == len(outputs), "one output for each choice and step"
    return by_choice


def run_choices(engine: Engine, *, max_steps: int = 500) -> dict[tuple[str, int], list[SequenceOutput]]:
    """Steps until nothing happens any more; all outputs by request and choice."""
    collected: dict[tuple[str, int], list[SequenceOutput]] = {}
    for _ in range(max_steps):
        num_steps = engine.counts().engine_steps
        for key, each in step_choices(engine).items():
            collected.setdefault(key, []).append(each)
        if engine.counts().engine_steps == num_steps:
            return collected
    raise AssertionError(f"not at rest after {max_steps} steps: {engine.counts()}")


def token_ids(outputs: list[SequenceOutput]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


def reason(outputs: list[SequenceOutput]) -> FinishReason | None:
    return outputs[-1].finish_reason


class RecordingRunner(FakeRunner):
    """A fake runner that keeps what it was asked for: request, start and number of tokens of every slice, by run."""

    def __init__(self) -> None:
        super().__init__(block_size=BLOCK_SIZE)
        self.runs: list[list[tuple[str, int, int]]] = []
        self.slices: list[SequenceSlice] = []

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        self.runs.append([(each.request_id, each.start, len(each.token_ids)) for each in slices])
        self.slices += slices
        return super().run(slices)
