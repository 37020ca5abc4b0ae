"""A cache directory: whose files are believed, what a writer's end leaves, and how processes take turns."""

import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from demo import MODEL_DIR
from staffetta import cache_dir
from staffetta.cache_dir import CacheDirectory, CacheUnusableError, open_cache
from staffetta.exits import ModelNotFoundError
from tests.engine.model_directory import make_model_directory


@pytest.fixture
def cache(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(tmp_path / "deep" / "cache")


def put(cache: CacheDirectory, name: str, content: bytes) -> Path:
    with cache.replace(name) as file:
        file.write(content)
    return cache.path / name


def content_of(cache: CacheDirectory, name: str) -> bytes | None:
    file = cache.open(name)
    if file is None:
        return None
    with file:
        return file.read()


def names_in(cache: CacheDirectory) -> list[str]:
    return sorted(path.name for path in cache.path.iterdir())


def test_a_file_is_there_whole_or_not_at_all(cache: CacheDirectory) -> None:
    assert content_of(cache, "a") is None
    with cache.replace("a") as file:
        file.write(b"first")
        assert content_of(cache, "a") is None
    assert content_of(cache, "a") == b"first"
    with cache.replace("a") as file:
        file.write(b"second")
        assert content_of(cache, "a") == b"first"
    assert content_of(cache, "a") == b"second"
    assert names_in(cache) == ["a"]


def test_directory_and_files_are_this_users_alone(cache: CacheDirectory) -> None:
    before = os.umask(0)
    try:
        other = CacheDirectory(cache.path.parent / "other")
        path = put(other, "a", b"")
        with other.turn("a", wait_s=0):
            assert stat.S_IMODE((other.path / "a.lock").stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert (stat.S_IMODE(other.path.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)


def test_a_writer_that_fails_leaves_nothing(cache: CacheDirectory) -> None:
    put(cache, "a", b"before")
    with pytest.raises(RuntimeError, match="midway"), cache.replace("a") as file:
        file.write(b"half")
        raise RuntimeError("midway")
    assert content_of(cache, "a") == b"before"
    assert names_in(cache) == ["a"]


WRITER = """
import os, signal, sys
from pathlib import Path
from staffetta.cache_dir import CacheDirectory
cache = CacheDirectory(Path(sys.argv[1]))
with cache.turn("a", wait_s=0), cache.replace("a") as file:
    file.write(b"half")
    print("writing", flush=True)
    signal.pause()
"""


def start_writer(cache: CacheDirectory) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(cache.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    return process


def test_a_killed_writer_leaves_no_file_no_lock_and_at_the_next_write_nothing(cache: CacheDirectory) -> None:
    with start_writer(cache) as process:
        process.send_signal(signal.SIGKILL)
    assert content_of(cache, "a") is None
    (left,) = (name for name in names_in(cache) if name.startswith(".new-"))
    with cache.turn("a", wait_s=1e9):
        put(cache, "a", b"whole")
    assert content_of(cache, "a") == b"whole"
    assert left not in names_in(cache)


def test_a_writer_that_lives_keeps_its_file_and_the_next_in_turn_waits_no_longer_than_told(
    cache: CacheDirectory,
) -> None:
    with start_writer(cache) as process:
        with cache.turn("a", wait_s=0.05):
            put(cache, "a", b"ours")
        assert any(name.startswith(".new-") for name in names_in(cache))
        with cache.turn("b", wait_s=1e9):  # another name is nobody's turn
            put(cache, "b", b"")
        process.kill()
    assert content_of(cache, "a") == b"ours"


def test_a_file_that_others_could_have_written_is_not_opened(cache: CacheDirectory, tmp_path: Path) -> None:
    path = put(cache, "a", b"x")
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(CacheUnusableError, match="can be written by others: chmod go-w "):
            cache.open("a")
    path.chmod(0o644)
    assert content_of(cache, "a") == b"x"
    (cache.path / "link").symlink_to(path)
    (cache.path / "folder").mkdir()
    os.mkfifo(cache.path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(CacheUnusableError):
            cache.open(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_owns_is_not_used(cache: CacheDirectory) -> None:
    os.chown(put(cache, "a", b"x"), 65534, 65534)
    with pytest.raises(CacheUnusableError, match="belongs to user 65534, not to this one"):
        cache.open("a")
    os.chown(cache.path, 65534, 65534)
    with pytest.raises(CacheUnusableError, match="belongs to user 65534"):
        CacheDirectory(cache.path)


def test_a_directory_that_others_can_write_is_not_used(cache: CacheDirectory) -> None:
    cache.path.chmod(0o777)
    with pytest.raises(CacheUnusableError, match="can be written by others"):
        CacheDirectory(cache.path)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache_dir, "LEAST_MODEL_BYTES", 1000)
    return make_model_directory(tmp_path / "model")


def test_a_setting_names_a_directory_the_users_own_or_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opened = [open_cache(setting, model=model) for setting in ("auto", str(tmp_path / "own"), "")]
    assert [cache and cache.path for cache in opened] == [tmp_path / "xdg" / "staffetta", tmp_path / "own", None]
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    at_home = open_cache("auto", model=model)
    assert at_home is not None and at_home.path == tmp_path / "home" / ".cache" / "staffetta"


def test_a_small_model_has_no_cache_and_makes_no_directory(model: Path, tmp_path: Path) -> None:
    cache_dir_path = tmp_path / "own"
    num_bytes = sum(path.stat().st_size for path in model.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_dir, "LEAST_MODEL_BYTES", num_bytes + 1)
        assert open_cache(str(cache_dir_path), model=model) is None
        assert not cache_dir_path.exists()
        patch.setattr(cache_dir, "LEAST_MODEL_BYTES", num_bytes)
        assert open_cache(str(cache_dir_path), model=model) is not None


def test_the_embedded_model_has_no_cache() -> None:
    assert open_cache("auto", model=MODEL_DIR) is None


def test_a_cache_that_cannot_be_had_is_told_in_one_line(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert open_cache(str(tmp_path / "file" / "cache"), model=model) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == [f"nothing is cached on disk: {tmp_path}/file/cache: Not a directory"]


def test_a_model_that_is_not_there_is_told_before_the_cache_is_made(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        open_cache(str(tmp_path / "own"), model=tmp_path)
    assert not (tmp_path / "own").exists()
