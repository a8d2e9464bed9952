"""A file of torch.save's whose tensors are written one at a time: they need never be in memory together.

torch.save itself lays the file out, with holes for the tensors' bytes; then each hole is filled, and the checksum that
the zip format keeps of it is put right. Source for the zip records: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
(4.3.7 local header, 4.3.9 data descriptor, 4.3.12 central directory).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from orchestrator.checkpoint.formats.progress import Progress
from orchestrator.checkpoint.tensor_file import bytes_of, pieces_of

_DESCRIPTOR = b"PK\x07\x08"  # follows a record's bytes: this signature, the checksum, the sizes


@dataclass(frozen=True)
class _Record:
    """Where in the file one tensor lies."""

    start: int
    size_bytes: int
    checksum_at: int  # in the directory of all records; it stands behind the tensor's bytes as well


class TorchFile:
    """What will be a file of torch.save's: make the content of blanks, then save it with the tensors."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def blank(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor to put into the content, in the order of these calls; its memory is never touched.

        A name may have several blanks, which all get the same bytes. One blank in several places is stored once.
        """
        self._names.append(name)
        return torch.empty(like.shape, dtype=like.dtype)

    def save(self, content: dict[str, Any], path: Path, tensors: Iterable[tuple[str, Tensor]], title: str) -> None:
        """Write a local file of the content, and each tensor as it comes into the blanks of its name.

        tensors: every name once, in any order. title: what a line about the progress calls the file.

        Raises:
            OSError: the file cannot be written.
        """
        with torch.serialization.skip_data():
            torch.save(content, path)
        blanks: dict[str, list[_Record]] = {}
        for name, record in zip(self._names, _records(path), strict=True):
            blanks.setdefault(name, []).append(record)
        progress = Progress(f"writing {title}", path.stat().st_size)
        with path.open("r+b") as file:
            for name, tensor in tensors:
                for record in blanks.pop(name):
                    _fill(file, record, bytes_of(tensor.detach().cpu().contiguous()), progress)
        assert not blanks, f"no tensor came for {sorted(blanks)[:5]}"


def _records(path: Path) -> list[_Record]:
    """Return the tensors' records in the order of their numbers, which is that of the tensors in the content."""
    found = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entry_at = archive.start_dir
        for info in archive.infolist():  # in the order of the directory's entries
            if "/data/" in info.filename:
                name_size, extra_size = _shorts(file, info.header_offset + 26, 2)
                start = info.header_offset + 30 + name_size + extra_size
                file.seek(start + info.file_size)
                assert file.read(4) == _DESCRIPTOR
                found[int(info.filename.rpartition("/")[2])] = _Record(start, info.file_size, entry_at + 16)
            entry_at += 46 + sum(_shorts(file, entry_at + 28, 3))  # name, extra, comment
    return [found[number] for number in sorted(found)]


def _shorts(file: BinaryIO, at: int, count: int) -> tuple[int, ...]:
    file.seek(at)
    return struct.unpack(f"<{count}H", file.read(2 * count))


def _fill(file: BinaryIO, record: _Record, content: memoryview, progress: Progress) -> None:
    assert len(content) == record.size_bytes
    checksum = 0
    file.seek(record.start)
    for piece in pieces_of(content):
        file.write(piece)
        checksum = zlib.crc32(piece, checksum)
        progress.add(len(piece))
    for at in (record.start + record.size_bytes + 4, record.checksum_at):
        file.seek(at)
        file.write(struct.pack("<I", checksum))
