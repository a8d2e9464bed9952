"""One file of tensors: written to and read from fsspec storage in the safetensors format, with a checksum.

Source for the format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, raw data). The
library's own writer needs the file in memory or on a local disk; this one streams to any storage, and reads a tensor
at a time straight into its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
import torch
import xxhash
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.errors import CheckpointError, MissingFileError, StorageUnavailableError
from orchestrator.storage.reasons import translated

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT_BYTES = 64  # of the first tensor in a file: where a GPU writes best; readers want 8
_PIECE_BYTES = 16 * 2**20
_BLOCK_BYTES = 4096  # what disks take without the page cache: whole ones, from memory that begins at a multiple
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file as it was written."""

    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Layout:
    """The first bytes of a file, and where in it every tensor lies: [start, end) in bytes, without gaps."""

    header: bytes
    spans: dict[str, tuple[int, int]]

    @property
    def size_bytes(self) -> int:
        return max((end for _, end in self.spans.values()), default=len(self.header))


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """Return the layout of a file of these tensors, which may be on any device."""
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, tensor in tensors.items():
        spans[name] = end, end + tensor.nbytes
        end += tensor.nbytes
    entries = {
        name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": spans[name]}
        for name, tensor in tensors.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    header = struct.pack("<Q", len(text)) + text
    return Layout(header, {name: (len(header) + start, len(header) + end) for name, (start, end) in spans.items()})


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, to read or to write; nothing is copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def checksum(tensor: Tensor) -> str:
    """Return the xxh3_128 of a tensor's bytes, which may be on any device."""
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor.detach().cpu().contiguous()))


def pieces_of(content: memoryview) -> Iterator[memoryview]:
    """Yield a buffer in pieces that are small enough to be told of one by one."""
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


def own_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous tensor in host memory in such pieces, to read or to write."""
    return pieces_of(bytes_of(tensor))


def tensor_pieces(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a file's bytes: header, then every tensor, without a copy where it lies in host memory."""
    yield layout_of(tensors).header
    for tensor in tensors.values():
        yield from own_pieces(tensor.detach().cpu().contiguous())


def write_file(
    fs: AbstractFileSystem,
    path: str,
    pieces: Iterable[bytes | memoryview],
    written: Callable[[int], None] = lambda _bytes: None,
) -> FileRecord:
    """Write a file as a stream and check that the storage holds as many bytes; `written` hears of each piece's size.

    Raises:
        CheckpointError: the storage has less or more than was written.
        OSError: and others of the storage's own. What was sent is taken back where the storage can do that.
    """
    digest = xxhash.xxh3_128()
    size_bytes = 0
    file = FileIO(path, "w") if type(fs) is LocalFileSystem else fs.open(path, "wb")
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(_give_up, file)
        writer = _DirectWriter(file) if isinstance(file, FileIO) else file
        for piece in pieces:
            writer.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
            written(len(piece))
        writer.flush()
        if isinstance(fs, LocalFileSystem):
            os.fsync(file.fileno())  # what is announced must survive a power cut; and some disks are full only here
        file.close()
        on_failure.pop_all()
    fs.invalidate_cache(fs._parent(path))
    stored_bytes = fs.info(path)["size"]
    if stored_bytes != size_bytes:  # some clients report success for half a file
        raise CheckpointError(f"{path}: wrote {size_bytes} bytes, but the storage holds {stored_bytes}")
    return FileRecord(size_bytes, digest.hexdigest())


class _DirectWriter:
    """Writes a new local file straight to the disk, past the page cache, where the file system can do that.

    That saves a copy of everything, and the wait at the end until the cache has been written.
    """

    def __init__(self, file: FileIO) -> None:
        self._file, self._is_direct = file, _pass_cache(file, True)
        self._buffer = memoryview(mmap.mmap(-1, _PIECE_BYTES))  # aligned; nothing of it is used before it is filled
        self._held = 0  # bytes in the buffer

    def write(self, piece: bytes | memoryview) -> None:
        left = memoryview(piece)
        while left and self._is_direct:
            if not self._held and (whole_bytes := _whole_blocks(left)):
                self._send(left[:whole_bytes])
                left = left[whole_bytes:]
                continue
            count = min(len(left), _PIECE_BYTES - self._held)
            self._buffer[self._held : self._held + count] = left[:count]
            self._held += count
            left = left[count:]
            if self._held == _PIECE_BYTES:
                self._send(self._buffer)
                self._held = 0
        self._send(left)

    def flush(self) -> None:
        """Write what is held back. The last bytes are no whole block: they go through the page cache."""
        self._is_direct = _pass_cache(self._file, False)
        self._send(self._buffer[: self._held])

    def _send(self, content: memoryview) -> None:
        while content:
            try:
                content = content[self._file.write(content) :]
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise  # a full disk, for one
                # Some refuse only now; and where a write has ended within a block, the next cannot begin there.
                self._is_direct = _pass_cache(self._file, False)


def _pass_cache(file: FileIO, is_wanted: bool) -> bool:
    """Let what is written go past the page cache, or through it; return whether it goes past it."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~_O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _O_DIRECT if is_wanted else flags)
    except OSError:  # a file system that cannot do that, such as tmpfs
        return False
    return is_wanted and _O_DIRECT != 0


def _whole_blocks(content: memoryview) -> int:
    """Return how many bytes can go to a disk as they lie in memory."""
    is_aligned = np.frombuffer(content, np.uint8).ctypes.data % _BLOCK_BYTES == 0
    return len(content) // _BLOCK_BYTES * _BLOCK_BYTES if is_aligned else 0


def _give_up(file: Any) -> None:
    """Drop a file that was begun. Closing it would make an object of its first half."""
    # the error that led here is the one to tell
    with contextlib.suppress(CheckpointError), translated("the file cannot be dropped"):
        if hasattr(file, "discard") and hasattr(file, "blocksize"):  # fsspec's own buffered file, on an object store
            file.closed = True  # or its destructor would send what is in the buffer
            file.discard()
        else:
            file.close()


def stream_tensors(
    fs: AbstractFileSystem,
    path: str,
    record: FileRecord,
    place: Callable[[str, torch.dtype, list[int]], Tensor] | None = None,
    read: Callable[[int], None] = lambda _bytes: None,
    pieces: Callable[[Tensor], Iterable[memoryview]] = own_pieces,
) -> Iterator[tuple[str, Tensor]]:
    """Read a file once, from the first byte to the last, and yield every tensor as soon as it is there.

    place: returns which tensor to fill, by name, dtype and shape: a contiguous one. Default: a new one.
    read: hears of the size of each piece that was read.
    pieces: yields where a tensor's bytes are read to; default: itself, in host memory.
    Whether the bytes are right is known at the end only: use nothing before the iterator is exhausted.

    Raises:
        CheckpointError: the file is missing, cut off or damaged.
        StorageUnavailableError: the storage does not answer.
    """
    with translated(f"{path} cannot be read", StorageUnavailableError):
        try:
            with fs.open(path, "rb") as file:
                source = _Verified(file, path, record, read)
                for name, dtype, shape in _entries(source):
                    tensor = place(name, dtype, shape) if place else torch.empty(shape, dtype=dtype)
                    source.fill(pieces(tensor))
                    yield name, tensor
                source.finish()
        except FileNotFoundError:
            raise MissingFileError(f"{path} is missing") from None


def read_tensors(fs: AbstractFileSystem, path: str, record: FileRecord) -> dict[str, Tensor]:
    """Read a file once, verify every byte of it and return its tensors.

    Raises:
        CheckpointError: the file is missing, cut off or damaged; or the storage does not answer.
    """
    return dict(stream_tensors(fs, path, record))


class _Verified:
    """A file that is read from front to back, and whose checksum is compared at its end."""

    def __init__(self, file: Any, path: str, record: FileRecord, read: Callable[[int], None]) -> None:
        self._file, self._path, self._record, self._read = file, path, record, read
        self._digest = xxhash.xxh3_128()
        self._count = 0

    def fill(self, pieces: Iterable[memoryview]) -> None:
        for piece in pieces:
            filled = 0
            while filled < len(piece):
                count = self._file.readinto(piece[filled:])
                if not count:
                    raise CheckpointError(
                        f"{self._path} has {self._count} bytes instead of {self._record.size_bytes}: it was cut off"
                    )
                filled += count
                self._count += count
                self._read(count)
            self._digest.update(piece)

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self._record.size_bytes - self._count:
            raise self.damaged()
        content = bytearray(count)
        self.fill(pieces_of(memoryview(content)))
        return bytes(content)

    def finish(self) -> None:
        if self._count != self._record.size_bytes or self._file.read(1):
            raise CheckpointError(f"{self._path} has more than {self._count} bytes: {self._record.size_bytes} expected")
        if self._digest.hexdigest() != self._record.xxh3_128:
            raise self.damaged()

    def damaged(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is damaged: its checksum differs from the one recorded when it was written"
        )


def _entries(source: _Verified) -> list[tuple[str, torch.dtype, list[int]]]:
    """Read the header and return name, dtype and shape of every tensor in the order of the data.

    Raises:
        CheckpointError: it contradicts itself, which is damage: the checksum is not known yet.
    """
    (length,) = struct.unpack("<Q", source.take(8))
    try:
        header = json.loads(source.take(length))
        found, end = [], 0
        for name, entry in header.items():
            dtype, shape, (start, after) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            size = dtype.itemsize * int(torch.Size(shape).numel())
            if start != end or after != start + size:
                raise source.damaged()
            found.append((name, dtype, shape))
            end = after
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise source.damaged() from None
    return found
