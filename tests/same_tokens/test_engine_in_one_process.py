"""The embedded model through the engine of one process: the same bits alone, batched, chunked and on other threads.

Token ids and float32 log-probabilities, the chosen and the alternatives, are compared for equality. Every variant
proves from the steps it ran that its condition occurred.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

import demo
from engine.engine import Engine
from engine.model_config import ModelConfig
from engine.request import Request, RequestId, RequestKind, SampledToken, SamplingParams
from engine.runner import ModelRunner, load_runner
from engine.step import SequenceSlice
from kernels.backend import WeightFormat
from kvtransfer.layout import KVDtype
from staffetta.hashing import BlockHasher
from tests.engine.making import make_limits, run_to_end

MODEL = Path(demo.__file__).parent / "model"
BLOCK_SIZE, NUM_BLOCKS = 16, 1024
PROMPT_LENGTHS = (1, 5, 63, 64, 65, 200, 17, 130)
MAX_TOKENS = 6


class CountingRunner:
    """A runner that keeps the number of sequences and the longest slice of every step."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.num_slices: list[int] = []
        self.longest: list[int] = []

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SampledToken | None]:
        self.num_slices.append(len(slices))
        self.longest.append(max(len(part.token_ids) for part in slices))
        return self._runner.run(slices)


def make_runner(dtype: KVDtype, stored: WeightFormat, *, threads: int) -> CountingRunner:
    config = ModelConfig.from_directory(MODEL)
    layout = config.kv_layout(block_size=BLOCK_SIZE, dtype=dtype, model_digest="demo")
    pool = memoryview(bytearray(layout.page_bytes * NUM_BLOCKS))
    return CountingRunner(
        load_runner(
            MODEL,
            config,
            layout,
            pool=pool,
            num_blocks=NUM_BLOCKS,
            threads=threads,
            device="cpu",
            quantization=stored.value,
        )
    )


def make_requests() -> list[Request]:
    """Prompts over several attention tiles; every second request is seeded, with filters."""
    requests = []
    for index, length in enumerate(PROMPT_LENGTHS):
        sampling = SamplingParams(
            temperature=0.9 * (index % 2),
            top_k=40 * (index % 2),
            top_p=0.95,
            seed=index,
            max_tokens=MAX_TOKENS,
            min_tokens=MAX_TOKENS,
            stop_token_ids=frozenset(),
            num_logprobs=3,
        )
        prompt = tuple((index * 97 + 31 * i * i + 7 * i) % 1000 + 3 for i in range(length))
        requests.append(Request(RequestId(f"r{index}"), RequestKind.GENERATE, prompt, sampling, arrival=index))
    return requests


def run(
    runner: CountingRunner, requests: list[Request], *, max_batch_tokens: int, max_sequences: int = 16
) -> dict[str, list[SampledToken]]:
    limits = make_limits(
        max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, max_model_len=2000, prefix_caching=False
    )
    hasher = BlockHasher(b"k" * 16, block_size=BLOCK_SIZE)
    engine = Engine(runner, num_blocks=NUM_BLOCKS, hasher=hasher, limits=limits)
    for request in requests:
        engine.add(request)
    outputs = run_to_end(engine, max_steps=2000)
    return {name: [token for output in each for token in output.tokens] for name, each in outputs.items()}


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", WeightFormat.AS_GIVEN), ("bfloat16", WeightFormat.AS_GIVEN), ("bfloat16", WeightFormat.INT8)],
    ids=["float32", "bfloat16", "int8"],
)
def test_tokens_and_logprobs_have_the_same_bits_however_they_are_computed(dtype: KVDtype, stored: WeightFormat) -> None:
    threads_before = torch.get_num_threads()
    requests = make_requests()
    runner = make_runner(dtype, stored, threads=1)
    alone: dict[str, list[SampledToken]] = {}
    for request in requests:
        alone |= run(runner, [request], max_batch_tokens=2048)
    assert set(runner.num_slices) == {1}
    assert {len(tokens) for tokens in alone.values()} == {MAX_TOKENS}
    assert len({tuple(token.token_id for token in tokens) for tokens in alone.values()}) == len(requests)
    for threads, max_batch_tokens in ((1, 2048), (1, 16), (2, 64), (3, 512)):
        other = make_runner(dtype, stored, threads=threads)
        batched = run(other, requests, max_batch_tokens=max_batch_tokens)
        assert max(other.num_slices) > 1, "requests shared a step"
        is_cut = max_batch_tokens < max(PROMPT_LENGTHS)
        assert (max(other.longest) < max(PROMPT_LENGTHS)) is is_cut, "prompts were cut where they must be"
        for name, tokens in alone.items():
            assert [dataclasses.astuple(token) for token in batched[name]] == [dataclasses.astuple(t) for t in tokens]
    torch.set_num_threads(threads_before)
