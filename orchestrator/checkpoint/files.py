"""One file of tensors: written to and read from fsspec storage in the safetensors format, with a checksum.

Source for the format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, raw data). The
library's own writer needs the file in memory or on a local disk; this one streams to any storage.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from fsspec import AbstractFileSystem
from torch import Tensor

from orchestrator.errors import CheckpointError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file as it was written."""

    size_bytes: int
    xxh3_128: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_tensors(fs: AbstractFileSystem, path: str, tensors: dict[str, Tensor]) -> FileRecord:
    """Write tensors as one safetensors file and check that the storage holds as many bytes.

    Raises:
        CheckpointError: the storage has less or more than was written.
        OSError: and others of the storage's own.
    """
    digest = xxhash.xxh3_128()
    size_bytes = 0
    with fs.open(path, "wb") as file:
        for piece in _pieces(tensors):
            file.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
        _to_disk(file)
    stored_bytes = fs.info(path)["size"]
    if stored_bytes != size_bytes:
        raise CheckpointError(f"{path}: wrote {size_bytes} bytes, but the storage holds {stored_bytes}")
    return FileRecord(size_bytes, digest.hexdigest())


def _pieces(tensors: dict[str, Tensor]) -> Any:
    """Yield the file's bytes: length, header, then every tensor without a copy where it lies in host memory."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(raw), _PIECE_BYTES):
            yield raw[start : start + _PIECE_BYTES].data


def _to_disk(file: Any) -> None:
    """On a local disk, wait until the bytes have reached it: what is announced must survive a power cut."""
    file.flush()
    with contextlib.suppress(AttributeError, OSError):
        os.fsync(file.fileno())


def read_tensors(fs: AbstractFileSystem, path: str, record: FileRecord) -> dict[str, Tensor]:
    """Read a file once, verify every byte of it and return its tensors, which share one buffer.

    Raises:
        CheckpointError: the file is missing, cut off or damaged; or the storage does not answer.
    """
    buffer = bytearray(record.size_bytes)
    try:
        with fs.open(path, "rb") as file:
            count = _read_into(file, buffer)
            longer = bool(file.read(1))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if count != len(buffer) or longer:
        raise CheckpointError(f"{path} has {'more' if longer else count} bytes instead of {len(buffer)}")
    if xxhash.xxh3_128(buffer).hexdigest() != record.xxh3_128:
        raise CheckpointError(f"{path} is damaged: its checksum differs from the one recorded when it was written")
    return _parse(buffer)


def _read_into(file: Any, buffer: bytearray) -> int:
    view, count = memoryview(buffer), 0
    while count < len(buffer):
        piece = file.read(min(_PIECE_BYTES, len(buffer) - count))
        if not piece:
            break
        view[count : count + len(piece)] = piece
        count += len(piece)
    return count


def _parse(buffer: bytearray) -> dict[str, Tensor]:
    (length,) = struct.unpack_from("<Q", buffer)
    header = json.loads(bytes(buffer[8 : 8 + length]))
    tensors = {}
    for name, entry in header.items():
        dtype, (start, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        count = (end - start) // dtype.itemsize
        tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=8 + length + start).view(
            entry["shape"]
        )
    return tensors
