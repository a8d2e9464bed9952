"""Tells by its first bytes what a file is that should hold text or tokens. Knows neither of these."""

from __future__ import annotations

import pickletools
import zlib
from itertools import islice

HEAD_BYTES = 4096
_FEWEST_TEXT_BYTES = 64

_MARKS = {
    "a .npy file": b"\x93NUMPY",
    "a zip file": b"PK\x03\x04",
    "a zstd file": b"\x28\xb5\x2f\xfd",
    "an xz file": b"\xfd7zXZ\x00",
    "a bzip2 file": b"BZh91AY&SY",
    "a parquet file": b"PAR1",
    "an arrow file": b"ARROW1",
    "an HDF5 file": b"\x89HDF\r\n",
    "a PDF": b"%PDF-",
    "an RTF document": b"{\\rtf1",
    "an old Word document": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "a pointer of Git LFS": b"version https://git-lfs",
}


def kind_of(head: bytes) -> str | None:
    """Return what a file that begins like this is, None where it may hold tokens or text."""
    for kind, mark in _MARKS.items():
        if head.startswith(mark):
            return kind
    if head.startswith(b"\x1f\x8b\x08") and _is_gzip(head):
        return "a gzip file"
    return "a pickle" if _is_pickle(head) else None


def is_text(head: bytes) -> bool:
    """Return whether a file that begins like this, with 64 bytes or more, is a text in UTF-8."""
    if len(head) < _FEWEST_TEXT_BYTES or b"\x00" in head:
        return False
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the head ends within a character
            return False
        text = head[: error.start].decode("utf-8")
    return all(char.isprintable() or char in "\n\r\t\f" for char in text)


def _is_gzip(head: bytes) -> bool:
    try:
        return bool(zlib.decompressobj(wbits=31).decompress(head))  # three bytes may be tokens, a stream not
    except zlib.error:
        return False


def _is_pickle(head: bytes) -> bool:
    if head[:1] != b"\x80" or head[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return False
    try:
        return len(list(islice(pickletools.genops(head), 4))) == 4  # two bytes may be a token, four instructions not
    except ValueError:
        return False
