"""Looks at the words of a token file that nobody describes: whether they can be uint16 tokens, as nanoGPT's are.

Refuses only what the words show, and names it. Nothing here knows vocabularies or folders.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.file_kinds import HEAD_BYTES, is_text, kind_of
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

_STRETCHES, _STRETCH_WORDS = 64, 16_384
_FEWEST_WORDS = 16  # below, nothing shows
_FEWEST_BYTES, _FEWEST_HIGH = 512, 16  # words, and different high bytes, that show tokens of one byte
_WRITE_UINT16 = "write them as uint16: np.array(ids, dtype=np.uint16).tofile(...)"
_REMEDIES = {
    "a .npy file": "np.load('train.npy').astype(np.uint16).tofile('train.bin') writes its tokens",
    "a zip file": "unpack or load it (.npz and PyTorch's .pt are such), and write its tokens with tofile",
    "a gzip file": "unpack it with gunzip",
    "a zstd file": "unpack it",
    "an xz file": "unpack it",
    "a bzip2 file": "unpack it",
    "a pickle": f"load it where you trust it, and {_WRITE_UINT16}",
    "a pointer of Git LFS": "fetch the file itself with git lfs pull",
    "a text": "`prepare NAME --text FILE` makes tokens of it",
}
# How a meta.json says what they are; floats are no ids, and so it can only say that they are uint16 after all.
_STATED = {
    "uint16 of big-endian byte order": ">u2",
    "int32 of big-endian byte order": ">i4",
    "int64 of big-endian byte order": ">i8",
    **dict.fromkeys(("float16", "float32", "float64"), "uint16"),
}
_FLOAT16_1024 = 0x6400  # from 1024 on, every float16 is a whole number


def check_words(path: Path, words: NDArray[Any]) -> None:
    """Check that a file of uint16 words (n_words,) does not show tokens of another type, or no tokens at all.

    Raises:
        DataError: it does; the message names what it looks like.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if kind := kind_of(head) or ("a text" if is_text(head) else None):
        remedy = f": {_REMEDIES[kind]}" if kind in _REMEDIES else ""
        raise DataError(f"{path} is {kind}{remedy}; a token file holds nothing but tokens, one after the other")
    if not words[-_STRETCH_WORDS:].any():
        logger.warning("%s ends in %s zeros or more: was it written to its end?", path, min(len(words), _STRETCH_WORDS))
    if looks := _other_type(_sampled(words)):
        raise DataError(
            f"{path} looks like {looks} tokens, and nothing says so: {_WRITE_UINT16}, or give a meta.json beside it "
            f'that says the dtype, such as {{"dtype": "{_STATED.get(looks, looks)}"}}'
        )


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
    for name, (zeros, place) in _ZEROS.items():
        if _has_zeros(words, zeros, place):
            return name
    low, high = words & 0xFF, words >> 8
    if not low.any() and len(np.unique(words)) > 2:
        return "uint16 of big-endian byte order"
    if len(words) >= _FEWEST_BYTES and max(low.max(), high.max()) < 0x80 and len(np.unique(high)) > _FEWEST_HIGH:
        return "uint8"  # the low bytes of thousands of ids would take all values
    return None


# type -> which two of four words are zero, and which one is not
_ZEROS = {
    "int64": ((2, 3), 0),
    "int64 of big-endian byte order": ((0, 1), 3),
    "int32": ((1, 3), 0),
    "int32 of big-endian byte order": ((0, 2), 1),
}


def _has_zeros(words: NDArray[np.uint16], zeros: tuple[int, int], place: int) -> bool:
    """Return whether of every four words these are zero, and at the other place a tenth at least is not."""
    rows = words.reshape(-1, 4)
    return not rows[:, zeros].any() and bool(np.count_nonzero(rows[:, place]) * 10 >= len(rows))


def _are_whole(values: NDArray[Any]) -> bool:
    """Return whether floats are whole numbers that could be token ids, and no zeros alone."""
    with np.errstate(all="ignore"):
        is_id = (values >= 0) & (values < 1 << 24) & (values == np.floor(values))
    return bool(is_id.all() and np.count_nonzero(values) * 10 >= len(values))
