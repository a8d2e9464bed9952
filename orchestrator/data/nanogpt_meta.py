"""What a folder that `prepare` did not make says about itself: nanoGPT's meta.pkl, or a plain meta.json.

A pickle is read by a loader that knows plain values only. This module must not know the token files.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from orchestrator.data.word_tokenizer import WordTokenizer
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

_USED = ("vocab_size", "itos", "stoi", "dtype")
_WIDEST_UINT16 = 1 << 16
_MOST_IDS = 1 << 32
_MOST_HOLES = 100_000  # ids without an entry
DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@dataclass(frozen=True)
class Known:
    """What is known of a folder of nanoGPT's.

    vocab_size: None is GPT-2's.
    dtype: of the token files, None where nothing says it: then nanoGPT's uint16.
    tokenizer: None where the entries cannot be turned into text, and why_no_tokenizer says why.
    """

    vocab_size: int | None = None
    dtype: np.dtype[Any] | None = None
    tokenizer: Tokenizer | None = None
    why_no_tokenizer: str = ""


def read_known(folder: Path) -> Known:
    """Return what meta.pkl and a meta.json that is not ours say; without both, it is GPT-2's, as nanoGPT assumes.

    Raises:
        DataError: a file is damaged, or says what cannot be.
    """
    said: dict[str, Any] = {}
    where = folder / "meta.pkl"
    if where.exists():
        said = read_nanogpt_meta(where)
    if (folder / "meta.json").exists():
        where = folder / "meta.json"
        said |= read_plain_meta(where)
    if not said:
        return Known(tokenizer=GPT2Tokenizer())
    dtype = _dtype(said["dtype"], where) if "dtype" in said else None
    if "vocab_size" not in said:  # the width alone
        return Known(None, dtype, GPT2Tokenizer())
    size = said["vocab_size"]
    if dtype is None and size > _WIDEST_UINT16:
        raise DataError(
            f"{where} says vocab_size={size:,}, and nothing says how wide the tokens in train.bin are: uint16, "
            f"nanoGPT's, ends at 65,535. Put a meta.json beside it that says the dtype, such as "
            f'{{"vocab_size": {size}, "dtype": "uint32"}}'
        )
    found = _tokenizer(said)
    return Known(size, dtype, None, found) if isinstance(found, str) else Known(size, dtype, found)


def read_nanogpt_meta(path: Path) -> dict[str, Any]:
    """Return nanoGPT's meta.pkl, a dict with `vocab_size` and perhaps `stoi` and `itos`, without running code from it.

    Raises:
        DataError: the pickle is damaged, asks for anything but plain values, or says no vocab_size.
    """
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file).load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise DataError(f"{path} is not a meta.pkl of plain values: {error}; nothing in it was run") from error
    return _checked(value, path)


def read_plain_meta(path: Path) -> dict[str, Any]:
    """Return what a meta.json that is not ours says of `vocab_size`, `dtype`, `itos` and `stoi`.

    Raises:
        DataError: it says neither vocab_size nor dtype.
    """
    value = read_json(path)
    if isinstance(value, dict) and "dtype" in value and not {"vocab_size", "itos", "stoi"} & value.keys():
        _note_others(value, path)
        return {"dtype": value["dtype"]}
    return _checked(value, path)


def read_json(path: Path) -> Any:
    """Return what a meta.json holds, a byte order mark or not.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r})") from None


def _checked(value: Any, path: Path) -> dict[str, Any]:
    """Return the keys that are used, vocab_size as an int, and name the others in a note.

    Raises:
        DataError: there is no vocab_size, and nothing that tells it.
    """
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a dict with vocab_size, as nanoGPT's does, not a {type(value).__name__}")
    size = _whole(value["vocab_size"]) if "vocab_size" in value else _size_of(value)
    if size is None or not 1 <= size <= _MOST_IDS:
        found = f"vocab_size={_shown(value['vocab_size'])}" if "vocab_size" in value else "no vocab_size"
        raise DataError(
            f"{path} says {found[:100]}, and must say an integer vocab_size, as nanoGPT's does, "
            f'such as {{"vocab_size": 65}}; is it damaged, or another program\'s?'
        )
    _note_others(value, path)
    return {key: value[key] for key in _USED if key in value} | {"vocab_size": size}


def _note_others(value: dict[str, Any], path: Path) -> None:
    others = [key[:40] if isinstance(key, str) else _shown(key) for key in value if key not in _USED]
    if others:
        more = ", ..." if len(others) > 8 else ""
        logger.info("%s: not used here: %s%s", path, ", ".join(others[:8]), more)


def _shown(value: Any) -> str:
    try:
        return repr(value)[:50]
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"{type(value).__name__} too long to be shown"


def _whole(value: Any) -> int | None:
    is_number = type(value) is int or (type(value) is float and value.is_integer())
    return int(value) if is_number else None


def _size_of(value: dict[str, Any]) -> int | None:
    """Return the size of a vocabulary that only itos or stoi tells, with ids from 0 without holes."""
    ids = set(_entries(value.get("itos")) or _inverted(value.get("stoi")))
    return len(ids) if ids == set(range(len(ids))) else None


def _dtype(said: Any, path: Path) -> np.dtype[Any]:
    try:
        found = np.dtype(said) if isinstance(said, str) else None
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise DataError(f"{path}: dtype {_shown(said)} is none of {', '.join(DTYPES)}")
    return found.newbyteorder("<") if re.fullmatch(r"[a-z]+\d+", said) else found


def _tokenizer(said: dict[str, Any]) -> Tokenizer | str:
    """Return the tokenizer that itos and stoi describe, or why they describe none."""
    size, itos = said["vocab_size"], said.get("itos")
    if itos is None and not said.get("stoi"):
        return "has no itos"
    entries = _inverted(said.get("stoi")) if itos is None else _entries(itos)
    if size > len(entries) + _MOST_HOLES:
        return f"has {len(entries):,} entries in itos for vocab_size={size:,}"
    words = [entries.get(i) for i in range(size)]
    odd = next(((i, word) for i, word in enumerate(words) if not isinstance(word, str | None)), None)
    if odd:
        return f"has {type(odd[1]).__name__} in itos (id {odd[0]}), not text"
    if not any(words):
        return "has an itos without any text"
    spellings = _spellings(said.get("stoi"), words)
    are_chars = not spellings and all(word and len(word) == 1 for word in words) and len(set(words)) == size
    return CharTokenizer("".join(map(str, words))) if are_chars else WordTokenizer(tuple(words), spellings)


def _entries(itos: Any) -> dict[int, Any]:
    """Return id -> entry of a dict or a list; JSON has ids as strings."""
    if isinstance(itos, list | tuple):
        return dict(enumerate(itos))
    if not isinstance(itos, dict):
        return {}
    return {int(key): word for key, word in itos.items() if type(key) is int or (type(key) is str and key.isdecimal())}


def _inverted(stoi: Any) -> dict[int, str]:
    return {i: word for word, i in reversed(_pairs(stoi))}


def _pairs(stoi: Any) -> list[tuple[str, int]]:
    items: Iterable[tuple[Any, Any]] = stoi.items() if isinstance(stoi, dict) else ()
    return [(word, i) for word, i in items if type(word) is str and type(i) is int]


def _spellings(stoi: Any, words: list[Any]) -> tuple[tuple[str, int], ...]:
    """Return what stoi says beyond the inverse of itos."""
    first = {word: i for i, word in reversed(list(enumerate(words)))}
    return tuple(sorted((word, i) for word, i in _pairs(stoi) if 0 <= i < len(words) and first.get(word) != i and word))


class _DType:
    """Stands for the numpy type that a pickle names, so that none of numpy's own code sees a pickle's values."""

    def __init__(self, name: str, *_options: Any) -> None:
        if not re.fullmatch(r"[biufU]\d{1,9}", name):
            raise pickle.UnpicklingError(f"it asks for the numpy type {name!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: _DType, data: Any) -> Any:
    """Return the plain value of a numpy scalar."""
    content = data if isinstance(data, bytes) else str(data).encode("latin-1")
    values: list[Any] = np.frombuffer(content, np.dtype(f"{dtype.order}{dtype.name}")).tolist()
    if len(values) != 1:
        raise pickle.UnpicklingError("it holds a numpy scalar of another length than its type's")
    return values[0]


def _latin1(text: str, _codec: str = "latin1") -> bytes:
    return text.encode("latin-1")


# What may be called: numpy's scalars and types by the stand-ins above, and how old protocols write bytes and sets.
_CALLABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _latin1,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class and function but those of plain values, so that nothing else can come out of a pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLABLE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _CALLABLE[module, name]
