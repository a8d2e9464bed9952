"""Looks at the words of a token file that nobody describes: whether they can be uint16 tokens, as nanoGPT's are.

Refuses only what the words show, and names it. Nothing here knows vocabularies or folders.
"""

from __future__ import annotations

import pickletools
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DataError

_STRETCHES, _STRETCH_WORDS = 64, 16_384
_FEWEST_WORDS = 16  # below, nothing shows
_HEAD_BYTES = 4096
_FEWEST_TEXT_BYTES = 64

# What files of other kinds begin with. Those with short marks are looked into as well: tokens may begin alike.
_MARKS: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "a .npy file: np.load('train.npy').astype(np.uint16).tofile('train.bin') writes its tokens"),
    (b"PK\x03\x04", "a zip file, as .npz and PyTorch's .pt are: unpack or load it, and write its tokens with tofile"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it"),
    (b"\xfd7zXZ\x00", "an xz file: unpack it"),
    (b"BZh91AY&SY", "a bzip2 file: unpack it"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an arrow file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"%PDF-", "a PDF"),
    (b"<!DOCTYPE", "a web page: has a download failed?"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
)
_WRITE_UINT16 = "write them as uint16: np.array(ids, dtype=np.uint16).tofile(...)"


def check_words(path: Path, words: NDArray[Any]) -> None:
    """Check that a file of uint16 words (n_words,) does not show tokens of another type, or no tokens at all.

    Raises:
        DataError: it does; the message names what it looks like.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = next((name for mark, name in _MARKS if head.startswith(mark)), None) or _kind_of(head)
    if kind:
        raise DataError(f"{path} is {kind}; a token file holds nothing but tokens, one after the other")
    if looks := _other_type(_sampled(words)):
        raise DataError(
            f"{path} looks like {looks} tokens, and nothing says so: {_WRITE_UINT16}, or give a meta.json beside it "
            f'that says the dtype, such as {{"dtype": "{looks if looks in _STATED else "uint16"}"}}'
        )


_STATED = ("int32", "int64")
_FLOAT16_1024 = 0x6400  # from 1024 on, every float16 is a whole number


def _kind_of(head: bytes) -> str | None:
    if head.startswith(b"\x1f\x8b\x08") and _is_gzip(head):
        return "a gzip file: unpack it with gunzip"
    if _is_pickle(head):
        return f"a pickle: load it where you trust it, and {_WRITE_UINT16}"
    return "a text: `prepare NAME --text FILE` makes tokens of it" if _is_text(head) else None


def _is_gzip(head: bytes) -> bool:
    try:
        return bool(zlib.decompressobj(wbits=31).decompress(head))
    except zlib.error:
        return False


def _is_pickle(head: bytes) -> bool:
    if head[:1] != b"\x80" or head[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return False
    try:
        return len(list(islice(pickletools.genops(head), 4))) == 4  # two bytes may be a token, four instructions not
    except ValueError:
        return False


def _is_text(head: bytes) -> bool:
    if len(head) < _FEWEST_TEXT_BYTES or b"\x00" in head:
        return False
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the head ends within a character
            return False
        text = head[: error.start].decode("utf-8")
    return all(char.isprintable() or char in "\n\r\t\f" for char in text)


def _sampled(words: NDArray[Any]) -> NDArray[np.uint16]:
    """Return stretches of the words (n,), spread from begin to end, each beginning at a multiple of four words."""
    n = len(words) // 4 * 4
    if n <= _STRETCHES * _STRETCH_WORDS:
        return np.array(words[:n])
    starts = [(n - _STRETCH_WORDS) * i // (_STRETCHES - 1) // 4 * 4 for i in range(_STRETCHES)]
    return np.concatenate([words[start : start + _STRETCH_WORDS] for start in starts])


def _other_type(words: NDArray[np.uint16]) -> str | None:
    """Return the type that the words show, None where they may be uint16."""
    if len(words) < _FEWEST_WORDS or not words.any():
        return None
    for name in ("float64", "float32"):
        if _are_whole(words.view(np.dtype(name).newbyteorder("<"))):
            return name
    if _are_whole(words.view("<f2")) and np.count_nonzero(words < _FLOAT16_1024) * 2 > len(words):
        return "float16"
    for name, (period, place) in _ZEROS.items():
        if _only(words, period, place):
            return name
    if not (words & 0xFF).any() and len(np.unique(words)) > 2:
        return "uint16 of big-endian byte order"
    return None


# type -> of how many words which one is not zero
_ZEROS = {
    "int64": (4, 0),
    "int64 of big-endian byte order": (4, 3),
    "int32": (2, 0),
    "int32 of big-endian byte order": (2, 1),
}


def _only(words: NDArray[np.uint16], period: int, place: int) -> bool:
    """Return whether all words but those at one place of each period are zero, and of those a tenth at least is not."""
    rows = words.reshape(-1, period)
    return not np.delete(rows, place, axis=1).any() and bool(np.count_nonzero(rows[:, place]) * 10 >= len(rows))


def _are_whole(values: NDArray[Any]) -> bool:
    """Return whether floats are whole numbers that could be token ids, and no zeros alone."""
    with np.errstate(all="ignore"):
        is_id = (values >= 0) & (values < 1 << 24) & (values == np.floor(values))
    return bool(is_id.all() and np.count_nonzero(values) * 10 >= len(values))
