"""Steps over a shared pool: chunks, batches, repeats, and what is refused."""

from pathlib import Path

import pytest
import torch

from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from engine.request import SampledToken
from engine.runner import ModelRunner, load_runner
from engine.step import SequenceSlice, SliceResult
from engine.weights import load_weights
from kernels.backend import select
from kvtransfer.layout import KVLayout
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
    weights = load_weights(directory, tensor_shapes(config), dtype="float32")
    weights["model.norm.weight"].fill_(float("inf"))
    pool = memoryview(bytearray(make_pool_bytes(directory)))
    runner = ModelRunner(
        config, weights, select("cpu"), layout=make_layout(directory), pool=pool, num_blocks=NUM_BLOCKS
    )
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
    return load_weights(directory, tensor_shapes(ModelConfig.from_directory(directory)), dtype="float32")


@pytest.mark.parametrize("size", [-1, 1])
def test_a_pool_of_the_wrong_size_is_refused(directory: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"needs {NUM_BLOCKS} writable pages of {make_layout(directory).page_bytes}"):
        make_runner(directory, pool=bytearray(make_pool_bytes(directory) + size))


def test_a_read_only_pool_a_foreign_layout_and_foreign_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    config, weights, layout = ModelConfig.from_directory(directory), load_all(directory), make_layout(directory)
    read_only = memoryview(bytes(make_pool_bytes(directory)))
    with pytest.raises(ValueError, match="read-only: True"):
        ModelRunner(config, weights, select("cpu"), layout=layout, pool=read_only, num_blocks=NUM_BLOCKS)
    other = make_layout(make_config_directory(tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(ValueError, match="layout is"):
        ModelRunner(config, weights, select("cpu"), layout=other, pool=memoryview(b""), num_blocks=0)
    narrow = {name: weight.bfloat16() for name, weight in weights.items()}
    pool = memoryview(bytearray(make_pool_bytes(directory)))
    with pytest.raises(ValueError, match="weights are not float32"):
        ModelRunner(config, narrow, select("cpu"), layout=layout, pool=pool, num_blocks=NUM_BLOCKS)


def test_threads_and_device_are_checked(directory: Path) -> None:
    config, layout = ModelConfig.from_directory(directory), make_layout(directory)
    pool = memoryview(bytearray(make_pool_bytes(directory)))
    with pytest.raises(ValueError, match="threads is 0"):
        load_runner(directory, config, layout, pool=pool, num_blocks=NUM_BLOCKS, threads=0, device="cpu")
    with pytest.raises(ValueError, match="'tpu'"):
        load_runner(directory, config, layout, pool=pool, num_blocks=NUM_BLOCKS, threads=1, device="tpu")
