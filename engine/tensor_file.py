"""Named tensors in one file that is mapped, not read: every process that opens it sees the same memory.

A file is believed only as a whole: its header names what it was made for, header, index and each tensor have a
checksum, and every offset and size is checked before it is used.

    [0, 4096)        header: magic, key, where the index is, checksums of index and header
    [4096, index)    tensors, each beginning at a multiple of 64 bytes, zeros between them
    [index, end)     the index: per tensor its name, dtype, shape, offset and checksum

Checksums are xxh3-64, numbers little-endian. The header is written last, so that what ends early has none.
"""

import io
import mmap
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import prod
from typing import IO, Final, NamedTuple

import torch
import xxhash
from torch import Tensor

KEY_BYTES: Final = 32

_MAGIC: Final = b"staffpk1"
_HEADER: Final = struct.Struct(f"<8s{KEY_BYTES}sQQQQ")  # magic, key, number of tensors, index: offset, bytes, checksum
_CHECKSUM: Final = struct.Struct("<Q")
_ENTRY: Final = struct.Struct("<HBBQQQQ")  # bytes of the name, dtype, dimensions, two sizes, offset, checksum
_DATA_OFFSET: Final = 4096
_ALIGNMENT: Final = 64
_MAX_DIMENSIONS: Final = 2
_MAX_INDEX_BYTES: Final = 2**26
_PAGE_BYTES: Final = 2 * 2**20

_DTYPES: Final = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16)


class TensorFileError(Exception):
    """A file is not, or not whole, what it was opened as. The message says what is wrong."""


class _Entry(NamedTuple):
    """One tensor of the index."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    checksum: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(file: IO[bytes], key: bytes, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes `tensors`, of one or two dimensions, into an empty file, holding none longer than it takes.

    Bytes depend on names, order and contents alone. Raises ValueError for a tensor that the format cannot hold.
    """
    out = _Pieces(file)
    out.write(bytes(_DATA_OFFSET))
    index = io.BytesIO()
    count = 0
    for name, tensor in tensors:
        if tensor.dim() not in (1, _MAX_DIMENSIONS) or tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        out.write(bytes(-out.position % _ALIGNMENT))
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        sizes = (*tensor.shape, 1)[:_MAX_DIMENSIONS]
        encoded = name.encode()
        number = _DTYPES.index(tensor.dtype)
        index.write(
            _ENTRY.pack(len(encoded), number, tensor.dim(), *sizes, out.position, xxhash.xxh3_64_intdigest(data))
        )
        index.write(encoded)
        out.write(data)
        count += 1
    offset, content = out.position, index.getvalue()
    out.write(content)
    out.flush()
    header = _HEADER.pack(_MAGIC, key, count, offset, len(content), xxhash.xxh3_64_intdigest(content))
    file.seek(0)
    _write_all(file, header + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header)))


def map_tensors(file: IO[bytes], key: bytes) -> dict[str, Tensor]:
    """Maps a file that was written for `key`, and returns its tensors: read-only, shared, alive without the file.

    Writing into them ends the process. The file must not be shortened meanwhile. Reads every byte once, for the
    checksums. Raises TensorFileError.
    """
    file.seek(0, io.SEEK_END)
    num_bytes = file.tell()
    if num_bytes < _DATA_OFFSET:
        raise TensorFileError(f"it ends after {num_bytes} bytes")
    mapping = mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with suppress(OSError):  # a kernel that has no huge pages for files: slower, not wrong
        mapping.madvise(mmap.MADV_HUGEPAGE)
    content = memoryview(mapping)
    entries = list(_parse(content, key))
    for entry in entries:
        found = xxhash.xxh3_64_intdigest(content[entry.offset : entry.offset + entry.num_bytes])
        if found != entry.checksum:
            raise TensorFileError(f"the checksum of {entry.name} is wrong")
    with warnings.catch_warnings():
        # That the memory is not writable is the point.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        everything = torch.frombuffer(mapping, dtype=torch.uint8)
    return {
        entry.name: everything[entry.offset : entry.offset + entry.num_bytes].view(entry.dtype).view(entry.shape)
        for entry in entries
    }


def _parse(content: memoryview, key: bytes) -> Iterator[_Entry]:
    """The entries of the index, each within its bounds. Raises TensorFileError."""
    header, checksum = content[: _HEADER.size], content[_HEADER.size : _HEADER.size + _CHECKSUM.size]
    magic, found_key, count, index_offset, index_bytes, index_checksum = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise TensorFileError("it has no header")
    if _CHECKSUM.unpack(checksum)[0] != xxhash.xxh3_64_intdigest(header):
        raise TensorFileError("the checksum of its header is wrong")
    if found_key != key:
        raise TensorFileError("it was made for something else")
    if index_bytes > _MAX_INDEX_BYTES or index_offset + index_bytes != len(content):
        raise TensorFileError(f"its index of {index_bytes} bytes is not the end of its {len(content)} bytes")
    index = bytes(content[index_offset:])
    if xxhash.xxh3_64_intdigest(index) != index_checksum:
        raise TensorFileError("the checksum of its index is wrong")
    position, names = 0, set()
    for _ in range(count):
        if position + _ENTRY.size > len(index):
            raise TensorFileError(f"its index ends before {count} tensors")
        name_bytes, number, dimensions, *sizes, offset, checksum = _ENTRY.unpack_from(index, position)
        position += _ENTRY.size
        encoded = index[position : position + name_bytes]
        position += name_bytes
        if number >= len(_DTYPES) or not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise TensorFileError(f"{encoded!r} has dtype {number} and {dimensions} dimensions")
        name = encoded.decode(errors="replace")
        entry = _Entry(name, _DTYPES[number], tuple(sizes[:dimensions]), offset, checksum)
        if offset % _ALIGNMENT or offset < _DATA_OFFSET or offset + entry.num_bytes > index_offset or name in names:
            raise TensorFileError(f"{name} cannot be {entry.num_bytes} bytes at {offset}")
        names.add(name)
        yield entry
    if position != len(index):
        raise TensorFileError(f"its index goes on after {count} tensors")


class _Pieces:
    """Writes at multiples of a huge page only, and whole ones: the system then keeps what was written in such pages."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._started = bytearray()  # of a page
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends."""
        rest = memoryview(data)
        self.position += len(rest)
        if self._started:
            missing = _PAGE_BYTES - len(self._started)
            self._started += rest[:missing]
            rest = rest[missing:]
            if len(self._started) == _PAGE_BYTES:
                self.flush()
        if rest:
            whole = len(rest) - len(rest) % _PAGE_BYTES
            _write_all(self._file, rest[:whole])
            self._started += rest[whole:]

    def flush(self) -> None:
        """Writes what has been appended since the last page."""
        _write_all(self._file, self._started)
        self._started = bytearray()


def _write_all(file: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
