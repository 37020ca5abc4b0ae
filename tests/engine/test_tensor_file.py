"""The file of named tensors: what comes back, what is mapped how, and everything that is not believed."""

import hashlib
import mmap
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from engine.tensor_file import TensorFileError, map_tensors, write_tensors

KEY = hashlib.blake2b(b"key", digest_size=32).digest()
HEADER_BYTES, INDEX_AT = 72, 48  # without its checksum; where the index's offset, size and checksum are


def make_tensors() -> dict[str, Tensor]:
    """One of every dtype, odd sizes, one larger than two huge pages, one empty."""
    return {
        "panels": torch.arange(5 * 2**20, dtype=torch.int64).to(torch.uint8),
        "a/int8": torch.arange(-7, 6, dtype=torch.int8),
        "a/int32": torch.tensor([2**31 - 1, -5], dtype=torch.int32),
        "a/int64": torch.tensor([2**40]),
        "norm": torch.randn(33, generator=torch.Generator().manual_seed(1)),
        "table": torch.arange(21).view(3, 7).bfloat16(),
        "half": torch.arange(6).view(6, 1).half(),
        "empty": torch.empty(0),
    }


def write(path: Path, tensors: dict[str, Tensor], key: bytes = KEY) -> Path:
    with path.open("w+b", buffering=0) as file:
        write_tensors(file, key, tensors.items())
    return path


def read(path: Path, key: bytes = KEY) -> dict[str, Tensor]:
    with path.open("rb", buffering=0) as file:
        return map_tensors(file, key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "file", make_tensors())


def test_tensors_come_back_as_they_were_written(path: Path) -> None:
    found, expected = read(path), make_tensors()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_every_tensor_begins_at_a_line(path: Path) -> None:
    assert {tensor.data_ptr() % 64 for tensor in read(path).values() if len(tensor)} == {0}


def test_a_strided_tensor_is_written_as_its_rows(tmp_path: Path) -> None:
    tensor = torch.arange(12).view(3, 4).T
    assert torch.equal(read(write(tmp_path / "file", {"a": tensor}))["a"], tensor)


def test_equal_tensors_make_equal_bytes(path: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "other", make_tensors()).read_bytes() == path.read_bytes()


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    assert read(write(tmp_path / "file", {})) == {}


def test_mapped_memory_is_the_files_own_and_cannot_be_written(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.engine.test_tensor_file import read\n"
        "tensors = read(Path(sys.argv[1])); print(int(tensors['panels'][3]), flush=True); tensors['panels'][3] = 9"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-11, b"3\n")
    tensors = read(path)
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f" {path}")]
    assert line.split()[1] == "r--s"
    del tensors
    assert f" {path}\n" not in Path("/proc/self/maps").read_text()


def test_tensors_outlive_the_file_and_its_name(path: Path) -> None:
    tensors = read(path)
    path.unlink()
    assert torch.equal(tensors["panels"], make_tensors()["panels"])


def test_only_tensors_of_the_format_are_written(tmp_path: Path) -> None:
    for tensor in (torch.tensor(1.0), torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="odd is torch"):
            write(tmp_path / "file", {"odd": tensor})


def test_a_file_for_another_key_is_refused(path: Path) -> None:
    with pytest.raises(TensorFileError, match="made for something else"):
        read(path, hashlib.blake2b(b"other", digest_size=32).digest())


def test_a_file_without_its_header_is_refused(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(HEADER_BYTES + 8))
    with pytest.raises(TensorFileError, match="it has no header"):
        read(path)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 2**20, -4096, -1])
def test_a_truncated_file_is_refused(path: Path, size: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(TensorFileError, match=r"ends after|is not the end of"):
        read(path)


def test_a_longer_file_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TensorFileError, match="is not the end of"):
        read(path)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_of_header_or_index_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {"a": torch.zeros(2), "b": torch.ones(2, 2)})
    content = path.read_bytes()
    (index_offset,) = struct.unpack_from("<Q", content, INDEX_AT)
    bits = [*range(8 * (HEADER_BYTES + 8)), *range(8 * index_offset, 8 * len(content))]
    for bit in bits:
        flip(path, bit)
        with pytest.raises(TensorFileError):
            read(path)
        flip(path, bit)
    assert path.read_bytes() == content and len(read(path)) == 2


@pytest.mark.parametrize("name", [name for name, tensor in make_tensors().items() if len(tensor)])
def test_a_flipped_bit_of_a_tensor_is_found_and_the_tensor_named(path: Path, name: str) -> None:
    tensors = read(path)
    base = min(tensor.data_ptr() for tensor in tensors.values() if len(tensor)) - 4096
    flip(path, 8 * (tensors[name].data_ptr() - base + tensors[name].nbytes - 1) + 5)
    with pytest.raises(TensorFileError, match=f"the checksum of {name} is wrong"):
        read(path)


def forge(path: Path, *, entry: bytes, count: int = 1, offset: int = 4160) -> None:
    """A file whose checksums are right and whose one entry is `entry`; 64 bytes of data lie at 4096."""
    header = struct.pack("<8s32sQQQQ", b"staffpk1", KEY, count, offset, len(entry), xxhash.xxh3_64_intdigest(entry))
    content = header + xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")
    path.write_bytes(content.ljust(4096, b"\0") + bytes(64) + entry)


def make_entry(
    *, name: bytes = b"a", dtype: int = 0, dimensions: int = 1, sizes: tuple[int, int] = (64, 1), offset: int = 4096
) -> bytes:
    checksum = xxhash.xxh3_64_intdigest(bytes(64))
    return struct.pack("<HBBQQQQ", len(name), dtype, dimensions, *sizes, offset, checksum) + name


FORGED = {
    "past-the-data": (make_entry(sizes=(65, 1)), "a cannot be 65 bytes at 4096"),
    "huge": (make_entry(dimensions=2, sizes=(2**63, 2**63)), "a cannot be "),
    "far": (make_entry(offset=2**63), "a cannot be 64 bytes at "),
    "in-the-header": (make_entry(offset=0), "a cannot be 64 bytes at 0"),
    "unaligned": (make_entry(sizes=(32, 1), offset=4097), "a cannot be 32 bytes at 4097"),
    "no-such-dtype": (make_entry(dtype=7), "has dtype 7"),
    "no-dimensions": (make_entry(dimensions=0), "and 0 dimensions"),
    "three-dimensions": (make_entry(dimensions=3), "and 3 dimensions"),
    "long-name": (make_entry()[:-1], "goes on after|ends before|is not the end"),
    "cut": (make_entry()[:20], "ends before 1 tensors"),
}


@pytest.mark.parametrize("what", FORGED)
def test_an_entry_that_lies_is_refused_whatever_its_checksums(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    forge(path, entry=make_entry())
    assert read(path)["a"].tolist() == [0] * 64
    entry, message = FORGED[what]
    forge(path, entry=entry)
    with pytest.raises(TensorFileError, match=message):
        read(path)


def test_an_index_of_the_wrong_length_place_or_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    forge(path, entry=make_entry() + make_entry(name=b"b"), count=2)
    assert list(read(path)) == ["a", "b"]
    for entry, count, message in (
        (make_entry() * 2, 2, "a cannot be"),
        (make_entry() * 2, 1, "goes on after 1"),
        (make_entry(), 2**60, "ends before"),
    ):
        forge(path, entry=entry, count=count)
        with pytest.raises(TensorFileError, match=message):
            read(path)
    for offset in (4159, 4161, 2**64 - 1):
        forge(path, entry=make_entry(), offset=offset)
        with pytest.raises(TensorFileError, match="is not the end of"):
            read(path)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_a_kernel_without_huge_pages_maps_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    assert list(read(path)) == list(make_tensors())
