"""Remembered digests: never another one than hashing would give."""

import os
import time
from pathlib import Path

import pytest

from staffetta import digest_memo
from staffetta.cache_dir import CacheDirectory
from staffetta.digest_memo import remembered_digest
from staffetta.exits import ModelNotFoundError
from staffetta.identity import model_digest
from tests.engine.model_directory import make_model_directory


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that has been left alone for long enough."""
    monkeypatch.setattr(digest_memo, "_SETTLED_S", 0.0)
    return make_model_directory(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(tmp_path / "cache")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that were hashed."""
    calls: list[Path] = []

    def watched(directory: Path) -> str:
        calls.append(directory)
        return model_digest(directory)

    monkeypatch.setattr(digest_memo, "model_digest", watched)
    return calls


def test_a_model_is_hashed_once(model: Path, cache: CacheDirectory, hashed: list[Path]) -> None:
    expected = model_digest(model)
    assert [remembered_digest(model, cache) for _ in range(3)] == [expected] * 3
    assert hashed == [model]
    assert remembered_digest(model.parent / "." / "model", cache) == expected
    assert len(hashed) == 1


def test_without_a_cache_it_is_hashed_every_time(model: Path, hashed: list[Path]) -> None:
    assert {remembered_digest(model, None) for _ in range(2)} == {model_digest(model)}
    assert len(hashed) == 2


def test_a_write_of_the_same_size_and_time_is_seen(model: Path, cache: CacheDirectory) -> None:
    first = remembered_digest(model, cache)
    path = model / "model.safetensors"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert remembered_digest(model, cache) == model_digest(model) != first


def test_a_replaced_an_added_and_a_removed_file_are_seen(model: Path, cache: CacheDirectory) -> None:
    digests = [remembered_digest(model, cache)]
    (model / "other").write_text((model / "config.json").read_text().replace("1e-05", "1e-06"))
    (model / "other").replace(model / "config.json")
    digests.append(remembered_digest(model, cache))
    (model / "tokenizer.json").write_text("{}")
    digests.append(remembered_digest(model, cache))
    (model / "tokenizer.json").unlink()
    assert remembered_digest(model, cache) == digests[1] == model_digest(model)
    assert len(set(digests)) == 3


def test_a_model_that_changed_a_moment_ago_is_not_remembered(
    model: Path, cache: CacheDirectory, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_memo, "_SETTLED_S", 2.0)
    for _ in range(2):
        remembered_digest(model, cache)
    assert len(hashed) == 2
    now = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: now)
    for _ in range(2):
        remembered_digest(model, cache)
    assert len(hashed) == 3


def test_what_was_remembered_of_a_model_that_changed_while_it_was_hashed_is_not_for_it(
    model: Path, cache: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(directory: Path) -> str:
        digest = model_digest(directory)
        (directory / "tokenizer.json").write_text("{}")
        return digest

    monkeypatch.setattr(digest_memo, "model_digest", disturbed)
    remembered_digest(model, cache)
    monkeypatch.undo()
    assert remembered_digest(model, cache) == model_digest(model)


@pytest.mark.parametrize("content", [b"", b"x", b"0" * 64, b"0" * 129, b"0" * 64 + b" " + b"1" * 64 + b"\n"])
def test_a_record_that_is_not_for_these_files_is_not_believed(
    model: Path, cache: CacheDirectory, content: bytes
) -> None:
    expected = remembered_digest(model, cache)
    (record,) = cache.path.glob("*.digest")
    right = record.read_bytes()
    for changed in (content, right[:-1], right + b"\n"):
        record.write_bytes(changed)
        assert remembered_digest(model, cache) == expected
        assert record.read_bytes() == right


def test_a_record_that_cannot_be_had_is_told_and_done_without(
    model: Path, cache: CacheDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    expected = remembered_digest(model, cache)
    (record,) = cache.path.glob("*.digest")
    record.chmod(0o666)
    assert remembered_digest(model, cache) == expected
    assert caplog.messages == [
        f"the model's digest is not remembered: {record} can be written by others: chmod go-w {record}"
    ]


def test_a_model_that_is_not_there_has_no_digest(tmp_path: Path, cache: CacheDirectory) -> None:
    with pytest.raises(ModelNotFoundError):
        remembered_digest(tmp_path / "nothing", cache)
