"""Token files: a folder with train.bin, val.bin and what is known about them, memory-mapped and checked.

The folder is ours (meta.json) or one that nanoGPT's own prepare.py made (perhaps meta.pkl). This module must not know
how blocks are drawn, nor where the text came from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_json
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SPLITS = ("train", "val")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SCAN_CHUNK_TOKENS = 1_000_000
_SCAN_CHUNKS = 100


@dataclass(frozen=True)
class Meta:
    """What meta.json says.

    vocab_size: ids that the tokenizer can produce (50,257 for GPT-2, though models pad it to 50,304).
    dtype: "uint16" or "uint32".
    tokenizer: the tokenizer's JSON value.
    source_name, source_sha256: the text; the hash is over its bytes as they were read.
    """

    vocab_size: int
    dtype: str
    tokenizer: dict[str, Any]
    train_tokens: int
    val_tokens: int
    source_name: str
    source_sha256: str
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the text of meta.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """One dataset folder, open.

    splits: "train" and "val" -> read-only token ids (n_tokens,), views of memory-mapped files.
    meta: None for a folder that nanoGPT's own prepare.py made.
    vocab_size: the vocabulary that a new model takes; None means GPT-2's, padded to 50,304.
    tokenizer: None where the folder does not tell it.
    """

    folder: Path
    splits: dict[str, NDArray[Any]]
    meta: Meta | None
    vocab_size: int | None
    tokenizer: Tokenizer | None

    def check_fits(self, block_size: int, vocab_size: int) -> None:
        """Check that a model can be trained on these files.

        Splits of up to 100 million tokens are scanned whole; of longer ones 100 stretches of a million tokens, evenly
        spaced from the first token to the last.

        Raises:
            DataError: a split has fewer than block_size + 1 tokens, or a token that the model does not know.
        """
        for split, tokens in self.splits.items():
            path = self.folder / f"{split}.bin"
            if len(tokens) <= block_size:
                raise DataError(
                    f"{path} has {len(tokens):,} tokens, but block_size={block_size} needs at least "
                    f"{block_size + 1:,} (a sequence and its shifted target); take a smaller block_size or more text"
                )
            _check_vocabulary(path, tokens, vocab_size)

    def fingerprint(self) -> str:
        """Return a hash of the lengths, the type and up to 64 stretches of 16,384 tokens of each split.

        It tells datasets apart at a bounded cost: copies on several nodes, or the data before and after a restart.
        """
        digest = hashlib.sha256()
        for split, tokens in sorted(self.splits.items()):
            digest.update(f"{split} {tokens.dtype.str} {len(tokens)};".encode())
            for start in _stretches(len(tokens), 16_384, 64):
                digest.update(tokens[start : start + 16_384].tobytes())
        return digest.hexdigest()


def open_token_files(data_dir: str | Path, name: str) -> TokenFiles:
    """Open the dataset folder `data_dir/name`: memory-map its splits and read what is known about them.

    Raises:
        DataError: the folder or a file in it is missing, empty, truncated or not what its meta says.
    """
    folder = Path(data_dir) / name
    if not folder.is_dir():
        _raise_missing(Path(data_dir), name)
    meta = read_meta(folder)
    if meta is not None:
        tokenizer = tokenizer_from_json(meta.tokenizer)
        vocab_size = None if isinstance(tokenizer, GPT2Tokenizer) else meta.vocab_size
        return TokenFiles(folder, _map_splits(folder, meta), meta, vocab_size, tokenizer)
    splits = _map_splits(folder, None)
    if (folder / "meta.pkl").exists():
        known = read_nanogpt_meta(folder / "meta.pkl")
        return TokenFiles(folder, splits, None, known["vocab_size"], _nanogpt_tokenizer(folder / "meta.pkl", known))
    return TokenFiles(folder, splits, None, None, GPT2Tokenizer())  # as nanoGPT assumes where there is no meta


def read_tokenizer(data_dir: str | Path, name: str) -> Tokenizer | None:
    """Return the tokenizer of the dataset folder `data_dir/name`, whose token files need not be there.

    None where its meta does not tell it; GPT-2's where there is no meta, as nanoGPT assumes.

    Raises:
        DataError: the meta is damaged or of another version.
    """
    folder = Path(data_dir) / name
    if (meta := read_meta(folder)) is not None:
        return tokenizer_from_json(meta.tokenizer)
    path = folder / "meta.pkl"
    return _nanogpt_tokenizer(path, read_nanogpt_meta(path)) if path.exists() else GPT2Tokenizer()


def read_meta(folder: Path) -> Meta | None:
    """Return what a folder's meta.json says, None where there is no such file.

    Raises:
        DataError: the file is damaged, of another version, or marks a preparation that did not finish.
    """
    path = folder / "meta.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        version, is_complete = value["format_version"], value.get("is_complete", True)
        meta = Meta(**value) if version == FORMAT_VERSION and is_complete else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {_remedy(folder.parent, folder.name)}") from error
    if not is_complete:
        raise DataError(f"{folder}: its preparation did not finish; {_remedy(folder.parent, folder.name)}")
    if meta is None:
        raise DataError(f"{path} has format version {version!r}, this program knows {FORMAT_VERSION}")
    if meta.dtype not in _DTYPES or not all(type(n) is int for n in (meta.train_tokens, meta.val_tokens)):
        raise DataError(f"{path}: dtype {meta.dtype!r} or a token count is not valid; is the file damaged?")
    tokenizer_from_json(meta.tokenizer)
    return meta


def read_nanogpt_meta(path: Path) -> dict[str, Any]:
    """Return nanoGPT's meta.pkl, a dict with `vocab_size` and perhaps `stoi` and `itos`, without running code from it.

    Raises:
        DataError: the pickle is damaged or holds anything but dict, str and int.
    """
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a meta.pkl of dict, str and int: {error}; nothing in it was run") from error
    if not isinstance(value, dict) or type(value.get("vocab_size")) is not int or not _is_plain(value):
        raise DataError(f"{path} must hold a dict of dict, str and int with an integer vocab_size, as nanoGPT's does")
    return value


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class and function, so that nothing but plain values can come out of a pickle."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, int) and _is_plain(item) for key, item in value.items())
    return type(value) in (str, int)


def _nanogpt_tokenizer(path: Path, known: dict[str, Any]) -> Tokenizer | None:
    itos, vocab_size = known.get("itos"), known["vocab_size"]
    if itos is None:
        return None
    try:
        chars = [itos[i] for i in range(vocab_size)]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: itos must map every id from 0 to vocab_size - 1 = {vocab_size - 1}") from error
    if not all(isinstance(char, str) and len(char) == 1 for char in chars) or len(set(chars)) < vocab_size:
        raise DataError(f"{path}: itos must map ids to distinct single characters")
    return CharTokenizer("".join(chars))


def _map_splits(folder: Path, meta: Meta | None) -> dict[str, NDArray[Any]]:
    dtype = _DTYPES[meta.dtype if meta else "uint16"]
    expected = {"train": meta.train_tokens, "val": meta.val_tokens} if meta else {}
    return {split: _map(folder / f"{split}.bin", dtype, expected.get(split)) for split in SPLITS}


def _map(path: Path, dtype: np.dtype[Any], expected_tokens: int | None) -> NDArray[Any]:
    remedy = _remedy(path.parent.parent, path.parent.name)
    if not path.is_file():
        raise DataError(f"{path} is missing; {remedy}")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise DataError(f"{path} is empty; {remedy}")
    if size_bytes % dtype.itemsize:
        raise DataError(
            f"{path} is truncated: {size_bytes:,} bytes are no whole number of {dtype.itemsize}-byte tokens; {remedy}"
        )
    n_tokens = size_bytes // dtype.itemsize
    if expected_tokens is not None and n_tokens != expected_tokens:
        raise DataError(f"{path} has {n_tokens:,} tokens, but meta.json says {expected_tokens:,}; {remedy}")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain view indexes faster than the memmap class


def _check_vocabulary(path: Path, tokens: NDArray[Any], vocab_size: int) -> None:
    if len(tokens) > _SCAN_CHUNK_TOKENS * _SCAN_CHUNKS:
        logger.info("%s: checking %d stretches of a million tokens of its %d", path, _SCAN_CHUNKS, len(tokens))
    for start in _stretches(len(tokens), _SCAN_CHUNK_TOKENS, _SCAN_CHUNKS):
        chunk = tokens[start : start + _SCAN_CHUNK_TOKENS]
        if int(chunk.max()) >= vocab_size:
            position = start + int(np.argmax(chunk >= vocab_size))
            raise DataError(
                f"{path}: token {int(tokens[position])} at position {position:,} is outside the model's vocabulary "
                f"(vocab_size={vocab_size}, ids 0 to {vocab_size - 1}); was the model made for another dataset?"
            )


def _stretches(n_tokens: int, length: int, limit: int) -> Iterator[int]:
    """Yield the starts of stretches that cover a file, or of `limit` of them spread from its begin to its end."""
    if n_tokens <= length * limit:
        yield from range(0, n_tokens, length)
    else:
        yield from ((n_tokens - length) * i // (limit - 1) for i in range(limit))


def _raise_missing(data_dir: Path, name: str) -> NoReturn:
    datasets = sorted(path.parent.name for path in data_dir.glob("*/train.bin")) if data_dir.is_dir() else []
    there = f"there are: {', '.join(datasets)}" if datasets else "there is no dataset in that data_dir"
    raise DataError(f"no dataset folder {data_dir / name} ({there}); {_remedy(data_dir, name)}")


def _remedy(data_dir: Path, name: str) -> str:
    elsewhere = "" if data_dir == Path("data") else f" --data_dir={data_dir}"
    return f"run: python -m orchestrator prepare {name}{elsewhere}"
