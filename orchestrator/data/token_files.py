"""Token files: a folder with train.bin, val.bin and what is known about them, memory-mapped and checked.

The folder is ours (meta.json) or one that nanoGPT's own prepare.py made (perhaps meta.pkl). This module must not know
how blocks are drawn, nor where the text came from.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.nanogpt_meta import DTYPES, read_json, read_known
from orchestrator.data.token_words import check_words
from orchestrator.data.tokenizers import GPT2Tokenizer, Tokenizer, tokenizer_from_json
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SPLITS = ("train", "val")
_UINT16 = np.dtype("<u2")  # nanoGPT's
_SCAN_CHUNK_TOKENS = 1_000_000
_SCAN_CHUNKS = 100


@dataclass(frozen=True)
class Meta:
    """What meta.json says.

    vocab_size: ids that the tokenizer can produce (50,257 for GPT-2, though models pad it to 50,304).
    dtype: "uint16" or "uint32".
    tokenizer: the tokenizer's JSON value; what it names besides lies in the folder.
    source_name, source_sha256: the text; the hash is over its bytes as they were read.
    end_of_text: whether the end-of-text token was put between files and where the text has it.
    """

    vocab_size: int
    dtype: str
    tokenizer: dict[str, Any]
    train_tokens: int
    val_tokens: int
    source_name: str
    source_sha256: str
    format_version: int = FORMAT_VERSION
    end_of_text: bool = False

    def to_json(self) -> str:
        """Return the text of meta.json."""
        value = asdict(self)
        if not self.end_of_text:  # older versions know no such key
            del value["end_of_text"]
        return json.dumps(value, indent=1) + "\n"


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
            if len(tokens) > _SCAN_CHUNK_TOKENS * _SCAN_CHUNKS:
                logger.info("%s: checking %d stretches of a million tokens of its %d", path, _SCAN_CHUNKS, len(tokens))
            for start in _stretches(len(tokens), _SCAN_CHUNK_TOKENS, _SCAN_CHUNKS):
                chunk = tokens[start : start + _SCAN_CHUNK_TOKENS]
                if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
                    position = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
                    raise DataError(
                        f"{path}: token {int(tokens[position])} at position {position:,} is outside the model's "
                        f"vocabulary (vocab_size={vocab_size}, ids 0 to {vocab_size - 1}); was the model made for "
                        f"another dataset, or are the tokens no {tokens.dtype.name}?"
                    )

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
    try:
        if not folder.is_dir():
            _raise_missing(folder.parent, folder.name)
        paths = {split: folder / f"{split}.bin" for split in SPLITS}
        meta = read_meta(folder)
        if meta is not None:
            tokenizer = _own_tokenizer(folder, meta)
            vocab_size = None if isinstance(tokenizer, GPT2Tokenizer) else meta.vocab_size
            dtype = np.dtype(meta.dtype).newbyteorder("<")
            expected = {"train": meta.train_tokens, "val": meta.val_tokens}
            splits = {split: _map(path, dtype, expected[split]) for split, path in paths.items()}
            return TokenFiles(folder, splits, meta, vocab_size, tokenizer)
        known = read_known(folder)
        splits = {split: _map(path, known.dtype or _UINT16, None) for split, path in paths.items()}
        if known.dtype is None:
            for split, path in paths.items():
                check_words(path, splits[split])
        if known.why_no_tokenizer:
            logger.info("%s: %s, so samples cannot be shown as text", folder, known.why_no_tokenizer)
        return TokenFiles(folder, splits, None, known.vocab_size, known.tokenizer)
    except OSError as error:  # no permission, a loop of links, a disk that fails
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def read_tokenizer(data_dir: str | Path, name: str) -> Tokenizer:
    """Return the tokenizer of the dataset folder `data_dir/name`, whose token files need not be there.

    GPT-2's where there is no meta, as nanoGPT assumes.

    Raises:
        DataError: the meta is damaged or of another version, or does not tell the text of the ids.
    """
    folder = Path(data_dir) / name
    if (meta := read_meta(folder)) is not None:
        return _own_tokenizer(folder, meta)
    known = read_known(folder)
    if known.tokenizer is None:
        raise DataError(f"{folder}: its meta.pkl {known.why_no_tokenizer}, so token ids cannot be turned into text")
    return known.tokenizer


def read_meta(folder: Path) -> Meta | None:
    """Return what a folder's meta.json says, None where there is no such file, or another program's.

    Raises:
        DataError: the file is damaged, of another version, or marks a preparation that did not finish.
    """
    path = folder / "meta.json"
    if not path.exists():
        return None
    try:
        value = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; {_remedy(folder.parent, folder.name)}") from None
    if not isinstance(value, dict) or "format_version" not in value:
        return None
    try:
        version, is_complete = value["format_version"], value.get("is_complete", True)
        meta = Meta(**value) if version == FORMAT_VERSION and is_complete else None
    except TypeError as error:
        raise DataError(f"{path} is damaged ({error!r}); {_remedy(folder.parent, folder.name)}") from error
    if not is_complete:
        raise DataError(f"{folder}: its preparation did not finish; {_remedy(folder.parent, folder.name)}")
    if meta is None:
        raise DataError(f"{path} has format version {version!r}, this program knows {FORMAT_VERSION}")
    if meta.dtype not in DTYPES or not all(type(n) is int for n in (meta.train_tokens, meta.val_tokens)):
        raise DataError(f"{path}: dtype {meta.dtype!r} or a token count is not valid; is the file damaged?")
    tokenizer_from_json(meta.tokenizer)
    return meta


def _own_tokenizer(folder: Path, meta: Meta) -> Tokenizer:
    def read(name: str) -> str:
        try:
            return (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"it cannot be read ({reason})") from None

    try:
        return tokenizer_from_json(meta.tokenizer, read)
    except DataError as error:
        raise DataError(f"{folder}: its tokenizer: {error}; {_remedy(folder.parent, folder.name)}") from None


def _map(path: Path, dtype: np.dtype[Any], expected_tokens: int | None) -> NDArray[Any]:
    size_bytes = path.stat().st_size if path.is_file() else 0
    n_tokens, odd_bytes = divmod(size_bytes, dtype.itemsize)
    problem = ""
    if path.is_symlink() and not path.exists():
        problem = f"is a link to {path.readlink()}, which is not there"
    elif path.is_dir():
        problem = "is a folder, not a file of tokens"
    elif not path.is_file():
        problem = "is missing"
    elif not size_bytes:
        problem = "is empty"
    elif odd_bytes:
        problem = f"is truncated: {size_bytes:,} bytes are no whole number of {dtype.itemsize}-byte tokens"
    elif expected_tokens not in (None, n_tokens):
        problem = f"has {n_tokens:,} tokens, but meta.json says {expected_tokens:,}"
    if problem:
        raise DataError(f"{path} {problem}; {_remedy(path.parent.parent, path.parent.name)}")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain view indexes faster than the memmap class


def _stretches(n_tokens: int, length: int, limit: int) -> Iterator[int]:
    """Yield the starts of stretches that cover a file, or of `limit` of them spread from its begin to its end."""
    if n_tokens <= length * limit:
        yield from range(0, n_tokens, length)
    else:
        yield from ((n_tokens - length) * i // (limit - 1) for i in range(limit))


def _raise_missing(data_dir: Path, name: str) -> NoReturn:
    if (data_dir / name).exists():
        raise DataError(f"{data_dir / name} is a file: a dataset is a folder with train.bin and val.bin")
    datasets = sorted(path.parent.name for path in data_dir.glob("*/train.bin")) if data_dir.is_dir() else []
    there = f"there are: {', '.join(datasets)}" if datasets else "there is no dataset in that data_dir"
    raise DataError(f"no dataset folder {data_dir / name} ({there}); {_remedy(data_dir, name)}")


def _remedy(data_dir: Path, name: str) -> str:
    elsewhere = "" if data_dir == Path("data") else f" --data_dir={data_dir}"
    return f"run: python -m orchestrator prepare {name}{elsewhere}"
