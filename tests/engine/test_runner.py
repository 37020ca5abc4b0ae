"""Steps over a shared pool: chunks, batches, repeats, and what is refused."""

from pathlib import Path

import pytest
import torch

from engine.model_config import ModelConfig
from engine.models.llama import Llama, tensor_shapes
from engine.request import SampledToken, SamplingParams
from engine.runner import ModelRunner, load_runner
from engine.step import BlockCopy, Score, SequenceSlice, SliceResult
from engine.weights import StoredWeights
from kernels.backend import select
from kvtransfer.layout import BlockId, KVLayout
from tests.engine.model_directory import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    make_config_directory,
    make_model_directory,
    make_runner,
    make_sampling,
    make_slice,
)

GREEDY = make_sampling(num_logprobs=5)
PROMPT = [(7 * i * i + 3) % 97 for i in range(30)]
BLOCKS = [9, 4, 21, 2, 30, 13, 7, 1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("runner") / "model")


def only(results: list[SliceResult]) -> SampledToken:
    ((token,),) = (result.tokens for result in results)
    return token


def prefill(runner: ModelRunner, *ends: int, blocks: list[int] = BLOCKS) -> SampledToken:
    """Computes PROMPT in chunks that end at `ends` and at its own end; returns the sampled token."""
    start = 0
    for end in ends:
        assert runner.run((make_slice(PROMPT[:end], start=start, blocks=blocks, sampling=None),)) == [SliceResult()]
        start = end
    return only(runner.run((make_slice(PROMPT, start=start, blocks=blocks, sampling=GREEDY),)))


def assert_same(first: SampledToken, second: SampledToken, *, tolerance: float = 1e-5) -> None:
    assert (first.index, first.token_id) == (second.index, second.token_id)
    assert first.logprob == pytest.approx(second.logprob, abs=tolerance)
    assert [t for t, _ in first.top_logprobs] == [t for t, _ in second.top_logprobs]
    for (_, a), (_, b) in zip(first.top_logprobs, second.top_logprobs, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.parametrize("ends", [(1,), (16,), (13, 14, 29), tuple(range(4, 30, 4)), tuple(range(1, 30))], ids=str)
def test_chunked_prefill_equals_whole_prefill(directory: Path, ends: tuple[int, ...]) -> None:
    runner = make_runner(directory)
    whole = prefill(runner)
    assert_same(prefill(make_runner(directory), *ends), whole)


def test_chunks_leave_the_same_bytes_as_the_whole_within_rounding(directory: Path) -> None:
    first, second = (bytearray(make_pool_bytes(directory)) for _ in range(2))
    prefill(make_runner(directory, pool=first))
    prefill(make_runner(directory, pool=second), 5, 17)
    pools = [torch.frombuffer(pool, dtype=torch.float32) for pool in (first, second)]
    assert pools[0].count_nonzero() > 0
    torch.testing.assert_close(pools[0], pools[1], rtol=0, atol=1e-5)


def make_pool_bytes(directory: Path) -> int:
    layout = make_layout(directory)
    return layout.page_bytes * NUM_BLOCKS


def make_layout(directory: Path) -> KVLayout:
    return ModelConfig.from_directory(directory).kv_layout(block_size=BLOCK_SIZE, dtype="float32", model_digest="m")


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_tokens_do_not_depend_on_the_block_size(directory: Path, block_size: int) -> None:
    expected = prefill(make_runner(directory))
    runner = make_runner(directory, block_size=block_size)
    assert_same(prefill(runner, 11, blocks=list(range(60, 90))), expected)


def test_which_blocks_a_sequence_has_changes_no_bit(directory: Path) -> None:
    expected = prefill(make_runner(directory))
    assert prefill(make_runner(directory), blocks=[100, 3, 99, 50, 51, 0, 127, 64]) == expected


def make_mixed_slices() -> tuple[SequenceSlice, ...]:
    """A decode step, a whole prefill, a later chunk that samples, and one that does not."""
    return (
        make_slice(PROMPT[:21], start=20, blocks=[40, 41, 42, 43, 44, 45], sampling=GREEDY, output_index=3),
        make_slice(PROMPT[3:12], start=0, blocks=[50, 51, 52], sampling=make_sampling(temperature=1.0, seed=3)),
        make_slice(PROMPT[:27], start=9, blocks=[60, 61, 62, 63, 64, 65, 66], sampling=GREEDY, output_index=0),
        make_slice(PROMPT[:10], start=4, blocks=[70, 71, 72], sampling=None),
    )


def prepare(runner: ModelRunner) -> None:
    """Computes what precedes the mixed slices."""
    for part in make_mixed_slices():
        if part.start:
            runner.run((make_slice(PROMPT[: part.start], start=0, blocks=list(part.block_ids), sampling=None),))


def test_a_mixed_batch_equals_each_of_its_slices_alone(directory: Path) -> None:
    runner = make_runner(directory)
    prepare(runner)
    together = runner.run(make_mixed_slices())
    assert [len(result.tokens) for result in together] == [1, 1, 1, 0]
    for part, expected in zip(make_mixed_slices(), together, strict=True):
        alone = make_runner(directory)
        prepare(alone)
        (result,) = alone.run((part,))
        for token, other in zip(result.tokens, expected.tokens, strict=True):
            assert_same(token, other)


def test_running_a_step_again_gives_the_same_tokens_and_bytes(directory: Path) -> None:
    pool = bytearray(make_pool_bytes(directory))
    runner = make_runner(directory, pool=pool)
    prepare(runner)
    first = runner.run(make_mixed_slices())
    after = bytes(pool)
    assert runner.run(make_mixed_slices()) == first
    assert bytes(pool) == after


def test_all_choices_of_a_slice_are_drawn_from_its_logits(directory: Path) -> None:
    part = make_slice(PROMPT, start=0, blocks=BLOCKS, sampling=make_sampling(temperature=1.5, seed=5))
    (together,) = make_runner(directory).run((with_choices(part, (0, 1, 2, 3)),))
    assert len({token.token_id for token in together.tokens}) > 1
    for choice, token in enumerate(together.tokens):
        assert make_runner(directory).run((with_choices(part, (choice,)),)) == [SliceResult((token,))]


def with_choices(part: SequenceSlice, choices: tuple[int, ...]) -> SequenceSlice:
    assert part.draw is not None
    return part._replace(draw=part.draw._replace(choices=choices))


def scored(start: int, end: int, *, sampling: SamplingParams | None = None, alternatives: int = 2) -> SequenceSlice:
    """PROMPT[start:end], scored as far as the prompt goes."""
    part = make_slice(PROMPT[:end], start=start, blocks=BLOCKS, sampling=sampling)
    return part._replace(score=Score(targets=tuple(PROMPT[start + 1 : end + 1]), num_alternatives=alternatives))


def test_a_prompts_tokens_are_scored_as_if_each_had_been_drawn(directory: Path) -> None:
    (result,) = make_runner(directory).run((scored(0, len(PROMPT), sampling=GREEDY),))
    assert [(token.position, token.token_id) for token in result.prompt_tokens] == list(enumerate(PROMPT))[1:]
    for token in result.prompt_tokens:
        prefix = make_slice(PROMPT[: token.position], start=0, blocks=BLOCKS, sampling=make_sampling(num_logprobs=97))
        logprobs = dict(only(make_runner(directory).run((prefix,))).top_logprobs)
        assert token.logprob == logprobs[token.token_id]
        assert token.top_logprobs == tuple(logprobs.items())[:2]
    assert result.tokens == (only(make_runner(directory).run((scored(0, 30, sampling=GREEDY)._replace(score=None),))),)


@pytest.mark.parametrize("ends", [(1,), (16,), (13, 14, 29), tuple(range(1, 30))], ids=str)
def test_a_prompt_scored_in_chunks_has_the_same_bits(directory: Path, ends: tuple[int, ...]) -> None:
    (whole,) = make_runner(directory).run((scored(0, len(PROMPT), sampling=GREEDY),))
    runner, starts = make_runner(directory), (0, *ends)
    chunks = [scored(start, end) for start, end in zip(starts, ends, strict=False)]
    chunks.append(scored(starts[-1], len(PROMPT), sampling=GREEDY))
    assert tuple(token for chunk in chunks for token in runner.run((chunk,))[0].prompt_tokens) == whole.prompt_tokens


def test_logits_of_scored_rows_are_made_few_at_a_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = make_runner(directory).run((scored(0, len(PROMPT)), scored(0, 7, alternatives=0)))[:1]
    heights: list[int] = []

    class Watched(Llama):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            heights.append(len(hidden))
            return super().logits(hidden)

    monkeypatch.setattr("engine.runner._SCORED_ROWS", 5)
    monkeypatch.setattr("engine.packed_weights.Llama", Watched)
    tiled = make_runner(directory).run((scored(0, len(PROMPT)), scored(0, 7, alternatives=0)))
    assert heights == [5, 5, 5, 5, 5, 5, 5, 1]
    assert tiled[0] == whole
    assert [token.position for token in tiled[1].prompt_tokens] == [1, 2, 3, 4, 5, 6, 7]
    assert {token.top_logprobs for token in tiled[1].prompt_tokens} == {()}


def test_blocks_are_copied_before_anything_is_computed(directory: Path) -> None:
    # Two choices part after 30 tokens, in the middle of block 1: one copies it to 77, the other writes on in place.
    expected_runner = make_runner(directory)
    prefill(expected_runner)
    first = make_slice([*PROMPT, 5], start=30, blocks=BLOCKS, sampling=GREEDY, output_index=1)
    second = make_slice([*PROMPT, 8], start=30, blocks=[*BLOCKS[:-1], 77], sampling=GREEDY, output_index=1)
    expected = expected_runner.run((first,))
    pool = bytearray(make_pool_bytes(directory))
    runner = make_runner(directory, pool=pool)
    prefill(runner)
    copying = second._replace(copy=BlockCopy(BlockId(1), BlockId(77)))
    results = runner.run((first, copying))
    assert results[0] == expected[0]
    assert results[1] != expected[0]
    alone = make_runner(directory)
    prefill(alone)
    assert alone.run((second._replace(block_ids=first.block_ids),)) == [results[1]]
    after = bytes(pool)
    assert runner.run((copying,)) == [results[1]]
    assert runner.run((first, copying)) == results
    assert bytes(pool) == after


def test_a_copy_outside_the_pool_is_refused_before_a_block_is_written(directory: Path) -> None:
    pool = bytearray(make_pool_bytes(directory))
    runner = make_runner(directory, pool=pool)
    prefill(runner)
    before = bytes(pool)
    part = make_slice([*PROMPT, 8], start=30, blocks=BLOCKS, sampling=GREEDY)
    for copy in (BlockCopy(BlockId(9), BlockId(NUM_BLOCKS)), BlockCopy(BlockId(-1), BlockId(3))):
        with pytest.raises(IndexError, match=f"is outside the pool of {NUM_BLOCKS}"):
            runner.run((part._replace(copy=BlockCopy(BlockId(9), BlockId(3))), part._replace(copy=copy)))
    assert bytes(pool) == before


def test_garbage_in_unwritten_slots_reaches_no_result(directory: Path) -> None:
    clean = prefill(make_runner(directory), 13)
    pool = bytearray(b"\xff" * make_pool_bytes(directory))  # NaN everywhere
    assert prefill(make_runner(directory, pool=pool), 13) == clean


def test_keys_and_values_are_written_in_place_into_the_given_memory(directory: Path) -> None:
    pool = bytearray(make_pool_bytes(directory))
    prefill(make_runner(directory, pool=pool))
    page = make_layout(directory).page_bytes
    written = [block for block in range(NUM_BLOCKS) if any(pool[block * page : (block + 1) * page])]
    assert written == sorted(BLOCKS)


def test_a_decode_can_go_on_from_another_runners_bytes(directory: Path) -> None:
    pool = bytearray(make_pool_bytes(directory))
    token = prefill(make_runner(directory, pool=pool))
    step = (make_slice([*PROMPT, token.token_id], start=30, blocks=BLOCKS, sampling=GREEDY, output_index=1),)
    sender = make_runner(directory, pool=pool).run(step)
    receiver = make_runner(directory, pool=bytearray(pool)).run(step)
    assert only(sender) == only(receiver)


def test_no_slices_no_tokens(directory: Path) -> None:
    assert make_runner(directory).run(()) == []


BAD_SLICES = {
    "no tokens": (make_slice([5], start=1, blocks=[0], sampling=GREEDY), ValueError),
    "too few blocks": (make_slice([5] * 9, start=0, blocks=[0, 1], sampling=GREEDY), ValueError),
    "block outside the pool": (make_slice([5] * 5, start=0, blocks=[0, NUM_BLOCKS], sampling=GREEDY), IndexError),
    "token outside the vocabulary": (make_slice([97], start=0, blocks=[0], sampling=GREEDY), IndexError),
    "position beyond the model": (
        make_slice([5] * 257, start=256, blocks=list(range(65)), sampling=GREEDY),
        IndexError,
    ),
}


@pytest.mark.parametrize("name", BAD_SLICES)
def test_a_bad_slice_raises_and_the_others_can_be_run_again(directory: Path, name: str) -> None:
    bad, error = BAD_SLICES[name]
    good = make_slice(PROMPT, start=0, blocks=BLOCKS, sampling=GREEDY)
    runner = make_runner(directory)
    expected = only(make_runner(directory).run((good,)))
    with pytest.raises(error):
        runner.run((good, bad))
    assert only(runner.run((good,))) == expected


def test_numbers_that_overflow_end_the_step_not_the_sampling(directory: Path) -> None:
    config = ModelConfig.from_directory(directory)
    weights = dict(StoredWeights(directory, tensor_shapes(config), dtype="float32"))
    weights["model.norm.weight"].fill_(float("inf"))
    pool = memoryview(bytearray(make_pool_bytes(directory)))
    model = Llama.from_weights(config, weights, select("cpu"))
    runner = ModelRunner(config, model, select("cpu"), layout=make_layout(directory), pool=pool, num_blocks=NUM_BLOCKS)
    with pytest.raises(ArithmeticError, match="not finite"):
        prefill(runner)


def test_bfloat16_computes_within_its_precision(directory: Path) -> None:
    config = ModelConfig.from_directory(directory)
    layout = config.kv_layout(block_size=BLOCK_SIZE, dtype="bfloat16", model_digest="m")
    pool = memoryview(bytearray(layout.page_bytes * NUM_BLOCKS))
    runner = load_runner(directory, config, layout, pool=pool, num_blocks=NUM_BLOCKS, threads=1, device="cpu")
    wide = prefill(make_runner(directory))
    logprobs = dict(prefill(runner).top_logprobs)
    assert logprobs[wide.token_id] == pytest.approx(wide.logprob, abs=0.3)


def test_runner_states_what_it_is(directory: Path) -> None:
    torch.set_num_threads(2)
    runner = make_runner(directory)
    expected = sum(tensor.numel() for tensor in load_all(directory).values())
    assert runner.num_parameters == expected
    assert runner.backend_name == select("cpu").name
    assert torch.get_num_threads() == 1


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return dict(StoredWeights(directory, tensor_shapes(ModelConfig.from_directory(directory)), dtype="float32"))


@pytest.mark.parametrize("size", [-1, 1])
def test_a_pool_of_the_wrong_size_is_refused(directory: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"needs {NUM_BLOCKS} writable pages of {make_layout(directory).page_bytes}"):
        make_runner(directory, pool=bytearray(make_pool_bytes(directory) + size))


def test_a_read_only_pool_a_foreign_layout_and_foreign_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    config, weights, layout = ModelConfig.from_directory(directory), load_all(directory), make_layout(directory)

    def make_model(weights: dict[str, torch.Tensor]) -> Llama:
        return Llama.from_weights(config, weights, select("cpu"))

    read_only = memoryview(bytes(make_pool_bytes(directory)))
    with pytest.raises(ValueError, match="read-only: True"):
        ModelRunner(config, make_model(weights), select("cpu"), layout=layout, pool=read_only, num_blocks=NUM_BLOCKS)
    other = make_layout(make_config_directory(tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(ValueError, match="layout is"):
        ModelRunner(config, make_model(weights), select("cpu"), layout=other, pool=memoryview(b""), num_blocks=0)
    narrow = {name: weight.bfloat16() for name, weight in weights.items()}
    pool = memoryview(bytearray(make_pool_bytes(directory)))
    with pytest.raises(ValueError, match=r"weights are torch\.bfloat16, the layout is float32"):
        ModelRunner(config, make_model(narrow), select("cpu"), layout=layout, pool=pool, num_blocks=NUM_BLOCKS)


def test_threads_and_device_are_checked(directory: Path) -> None:
    config, layout = ModelConfig.from_directory(directory), make_layout(directory)
    pool = memoryview(bytearray(make_pool_bytes(directory)))
    with pytest.raises(ValueError, match="threads is 0"):
        load_runner(directory, config, layout, pool=pool, num_blocks=NUM_BLOCKS, threads=0, device="cpu")
    with pytest.raises(ValueError, match="'tpu'"):
        load_runner(directory, config, layout, pool=pool, num_blocks=NUM_BLOCKS, threads=1, device="tpu")
