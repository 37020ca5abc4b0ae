"""Packed weights on disk: the same bits with and without them, and nothing believed that is not whole."""

import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from math import prod
from pathlib import Path
from typing import Any, Literal

import pytest

from engine import packed_weights
from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from engine.request import SampledToken
from engine.runner import ModelRunner, load_runner
from engine.weights import StoredWeights
from kernels.cpu.packing import CpuPacking
from kvtransfer.layout import KVDtype
from staffetta.cache_dir import CacheDirectory
from staffetta.identity import model_digest
from tests.engine.model_directory import NUM_BLOCKS, make_model_directory, make_sampling, make_slice

PROMPT = [5, 90, 3, 3, 41, 17, 66, 8, 12, 54, 2]
GREEDY = make_sampling(num_logprobs=20)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model_directory(tmp_path / "model", attention_bias=True)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model of the same shape."""
    return make_model_directory(tmp_path / "other", attention_bias=True, rms_norm_eps=1e-3)


@pytest.fixture
def cache(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(tmp_path / "cache")


def load(
    model: Path,
    cache: CacheDirectory | None,
    *,
    dtype: KVDtype = "float32",
    quantization: Literal["none", "int8"] = "none",
    threads: int = 1,
    device: str = "cpu",
) -> ModelRunner:
    config = ModelConfig.from_directory(model)
    layout = config.kv_layout(block_size=4, dtype=dtype, model_digest=model_digest(model))
    return load_runner(
        model,
        config,
        layout,
        pool=memoryview(bytearray(layout.page_bytes * NUM_BLOCKS)),
        num_blocks=NUM_BLOCKS,
        threads=threads,
        device=device,
        quantization=quantization,
        cache=cache,
    )


def token_of(runner: ModelRunner) -> SampledToken:
    """Of one step over the prompt, with its log-probabilities."""
    (result,) = runner.run((make_slice(PROMPT, start=0, blocks=[3, 1, 2], sampling=GREEDY),))
    (token,) = result.tokens
    return token


def weights_in(cache: CacheDirectory) -> list[Path]:
    return sorted(cache.path.glob("*.weights"))


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_results_have_the_same_bits_without_a_cache_with_a_new_file_and_with_an_old_one(
    way: str, tied: bool, tmp_path: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_directory(tmp_path / "model", tie_word_embeddings=tied, mlp_bias=True)
    expected = token_of(load(model, None, **WAYS[way]))
    assert token_of(load(model, cache, **WAYS[way])) == expected
    monkeypatch.setattr("engine.runner.StoredWeights", None)  # the old file needs no others
    assert token_of(load(model, cache, **WAYS[way])) == expected
    assert len(weights_in(cache)) == 1


def test_the_file_has_the_same_bytes_however_many_threads_packed_it(model: Path, tmp_path: Path) -> None:
    caches = [CacheDirectory(tmp_path / str(threads)) for threads in (1, 3)]
    for cache, threads in zip(caches, (1, 3), strict=True):
        load(model, cache, threads=threads)
    (one,), (three,) = map(weights_in, caches)
    assert (one.name, one.read_bytes()) == (three.name, three.read_bytes())


def test_other_weights_have_a_file_of_their_own_and_another_build_takes_the_place_of_the_older(
    model: Path, other: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, (path, way) in enumerate(((model, {}), *((model, WAYS[name]) for name in WAYS), (other, {}))):
        load(path, cache, **way)
        assert len(weights_in(cache)) == max(1, number)
    assert caplog.messages == []
    before = [path.read_bytes() for path in weights_in(cache)]
    monkeypatch.setattr(CpuPacking, "version", "another build")
    expected = token_of(load(model, None))
    assert token_of(load(model, cache)) == expected
    (message,) = caplog.messages
    assert message.endswith("are not used and packed again: it was made for something else")
    after = [path.read_bytes() for path in weights_in(cache)]
    assert sum(map(bytes.__ne__, before, after)) == 1


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "flipped-in-a-tensor": lambda path: flip(path, path.stat().st_size // 2),
    "flipped-in-the-index": lambda path: flip(path, -9),
    "flipped-in-the-header": lambda path: flip(path, 30),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_and_made_again(
    damage: str, model: Path, cache: CacheDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    expected = token_of(load(model, cache))
    (path,) = weights_in(cache)
    right = path.read_bytes()
    DAMAGE[damage](path)
    assert token_of(load(model, cache)) == expected
    assert path.read_bytes() == right
    assert f"packed weights {path} are not used and packed again: " in caplog.text


def test_a_file_under_another_models_name_is_not_believed(
    model: Path, other: Path, cache: CacheDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    load(other, cache)
    (theirs,) = weights_in(cache)
    expected = token_of(load(model, cache))
    (ours,) = (path for path in weights_in(cache) if path != theirs)
    ours.write_bytes(theirs.read_bytes())
    assert token_of(load(model, cache)) == expected
    assert "it was made for something else" in caplog.text


def test_processes_that_start_at_once_map_one_file(model: Path, cache: CacheDirectory) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        found = pool.starmap(load_in_a_process, [(model, cache.path)] * 2)
    assert [token for token, _ in found] == [token_of(load(model, None))] * 2
    assert len({inode for _, inode in found}) == 1
    assert len(weights_in(cache)) == 1
    assert not any(path.name.startswith(".new-") for path in cache.path.iterdir())


def load_in_a_process(model: Path, path: Path) -> tuple[SampledToken, int]:
    """The token, and the inode that is mapped."""
    runner = load(model, CacheDirectory(path))
    (inode,) = {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line}
    return token_of(runner), inode


KILLED = """
import os, signal, sys
from pathlib import Path
from staffetta.cache_dir import CacheDirectory
from engine import tensor_file
from tests.engine.test_packed_weights import load
write = tensor_file._write_all
def write_and_die(file, data):
    write(file, data)
    os.kill(os.getpid(), signal.SIGKILL)
tensor_file._write_all = write_and_die
load(Path(sys.argv[1]), CacheDirectory(Path(sys.argv[2])))
"""


def test_a_process_killed_while_it_writes_leaves_no_file_that_is_seen(model: Path, cache: CacheDirectory) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(cache.path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert weights_in(cache) == []
    assert token_of(load(model, cache)) == token_of(load(model, None))
    assert not any(path.name.startswith(".new-") for path in cache.path.iterdir())


def test_where_nothing_can_be_written_weights_are_in_memory_and_one_line_says_so(
    model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.path.rmdir()  # nothing can be made in it, not even by root
    assert token_of(load(model, cache)) == token_of(load(model, None))
    (message,) = caplog.messages
    assert message.startswith("packed weights are not kept on disk (")
    assert message.endswith("): this process has its own copy in memory")


def test_a_model_that_changes_while_it_is_read_is_not_kept_under_its_old_name(
    model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = token_of(load(model, None))
    read = StoredWeights.__getitem__

    def disturbed(self: StoredWeights, name: str) -> Any:
        (model / "tokenizer.json").write_text("{}")
        return read(self, name)

    monkeypatch.setattr(StoredWeights, "__getitem__", disturbed)
    assert token_of(load(model, cache)) == expected
    assert weights_in(cache) == []
    (message,) = caplog.messages
    assert "the model's files changed while they were read" in message


def test_a_full_disk_leaves_nothing_behind(
    model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.tensor_file._write_all", full)
    assert token_of(load(model, cache)) == token_of(load(model, None))
    assert caplog.messages == [
        "packed weights are not kept on disk ([Errno 28] No space left on device): "
        "this process has its own copy in memory"
    ]
    assert [path.suffix for path in cache.path.iterdir()] == [".lock"]


def test_a_file_in_a_directory_that_cannot_be_written_is_still_used(
    model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(model, cache)
    monkeypatch.setattr(CacheDirectory, "turn", None)
    monkeypatch.setattr(CacheDirectory, "replace", None)
    assert token_of(load(model, cache)) == token_of(load(model, None))
    assert caplog.messages == []


def test_only_one_part_is_in_memory_while_weights_are_packed(
    model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, alive = 0, 0
    read = StoredWeights.__getitem__

    def watched(self: StoredWeights, name: str) -> Any:
        nonlocal most, alive
        tensor = read(self, name)
        alive += tensor.nbytes
        most = max(most, alive)

        def gone(num_bytes: int) -> None:
            nonlocal alive
            alive -= num_bytes

        weakref.finalize(tensor, gone, tensor.nbytes)
        return tensor

    monkeypatch.setattr(StoredWeights, "__getitem__", watched)
    load(model, cache)
    assert 0 < most < sum(4 * prod(shape) for shape in tensor_shapes(ModelConfig.from_directory(model)).values()) / 4


def test_the_reference_keeps_nothing_on_disk(model: Path, cache: CacheDirectory) -> None:
    load(model, cache, device="cpu-reference")
    assert list(cache.path.iterdir()) == []


def test_a_wait_for_another_process_ends(model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "_WAIT_S", 0.0)
    load(model, cache)
    (path,) = weights_in(cache)
    path.unlink()
    with cache.turn(path.name, wait_s=0.0):
        assert token_of(load(model, cache)) == token_of(load(model, None))
    assert weights_in(cache) == [path]
