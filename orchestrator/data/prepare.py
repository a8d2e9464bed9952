"""Prepare a dataset: text to token files, split as nanoGPT splits it.

The folder is never half of one text and half of another: while its files are exchanged, meta.json says that the
preparation did not finish. This module must not know training.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from orchestrator.data.texts import Text, expected_sha256, read_own_text, read_texts
from orchestrator.data.token_files import FORMAT_VERSION, SPLITS, Meta, open_token_files, read_meta
from orchestrator.data.token_ids import token_dtype
from orchestrator.data.token_writer import write_tokens
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

TokenizerKind = Literal["char", "gpt2"]

_TOKENIZER_OF: dict[str, TokenizerKind] = {"shakespeare_char": "char", "shakespeare": "gpt2", "quickstart": "char"}


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and from which text."""

    name: str
    """Dataset to make; quickstart, shakespeare_char and shakespeare bring their own text."""
    text: tuple[str, ...] = ()
    """Paths, globs or URLs (s3://, gs://, https://) of UTF-8 text, joined in this order."""
    tokenizer: TokenizerKind | None = None
    """char (one token per character) or gpt2 (GPT-2's BPE); default: gpt2, char for quickstart and shakespeare_char."""
    data_dir: str = "data"
    """Folder that holds the datasets, each in a folder of its name."""
    overwrite: bool = False
    """Write the files anew, whatever the folder holds."""


@dataclass(frozen=True)
class PreparedInfo:
    """What a dataset folder holds now; `str()` of it is a summary of one line.

    was_up_to_date: it held the same before, and nothing was written.
    """

    folder: Path
    meta: Meta
    was_up_to_date: bool

    def __str__(self) -> str:
        meta, state = self.meta, "up to date" if self.was_up_to_date else "written"
        return (
            f"{self.folder} ({state}): train {meta.train_tokens:,} tokens, val {meta.val_tokens:,} tokens, "
            f"{meta.tokenizer['kind']} vocabulary of {meta.vocab_size:,}, from {meta.source_name}"
        )


def prepare(config: PrepareConfig) -> PreparedInfo:
    """Turn a text into the token files of one dataset folder, or find that they are there already.

    Raises:
        DataError: the name or the text is not usable, or the folder holds another dataset and `overwrite` is not set.
    """
    if PurePath(config.name).name != config.name or config.name in ("", ".", ".."):
        raise DataError(f"a dataset's name is the name of a folder in data_dir, not {config.name!r}")
    folder = Path(config.data_dir) / config.name
    kind = config.tokenizer or _TOKENIZER_OF.get(config.name, "gpt2")
    known_sha256 = None if config.text else expected_sha256(config.name)
    if known_sha256 and not config.overwrite and (info := _existing(folder, kind, known_sha256)):
        return info  # the text need not even be downloaded
    text = read_texts(config.text) if config.text else read_own_text(config.name)
    if not config.overwrite and (info := _existing(folder, kind, text.sha256)):
        return info
    return _write(folder, kind, text)


def _existing(folder: Path, kind: TokenizerKind, sha256: str) -> PreparedInfo | None:
    """Return what the folder holds where that is what is wanted, None where nothing is lost by writing it."""
    if not any((folder / file).exists() for file in ("meta.json", "meta.pkl", "train.bin", "val.bin")):
        return None
    try:
        meta = read_meta(folder)
    except DataError as error:
        if _is_interrupted(folder):
            return None
        raise DataError(f"{error}; --overwrite writes the folder anew") from error
    if meta and meta.source_sha256 == sha256 and meta.tokenizer["kind"] == kind:
        return _up_to_date(folder, meta)
    holds = f"{meta.tokenizer['kind']} tokens of {meta.source_name}" if meta else "token files that nanoGPT made"
    raise DataError(
        f"{folder} already holds {holds}, not {kind} tokens of this text (SHA-256 {sha256[:12]}...); choose another "
        f"name, or replace it with --overwrite"
    )


def _up_to_date(folder: Path, meta: Meta) -> PreparedInfo | None:
    try:
        open_token_files(folder.parent, folder.name)
    except DataError as error:
        logger.warning("preparing %s again, because %s", folder, error)
        return None
    return PreparedInfo(folder, meta, was_up_to_date=True)


def _write(folder: Path, kind: TokenizerKind, text: Text) -> PreparedInfo:
    n_train = int(len(text.content) * 0.9)  # characters, as in nanoGPT
    if n_train == 0 or n_train == len(text.content):
        raise DataError(f"the text of {folder} has {len(text.content)} characters, too few to split 90 to 10")
    tokenizer: Tokenizer = CharTokenizer.of_text(text.content) if kind == "char" else GPT2Tokenizer()
    tokenizer.encode("")  # finds out now whether the vocabulary can be had, before anything is written
    parts = {"train": text.content[:n_train], "val": text.content[n_train:]}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {split: _temporary(folder / f"{split}.bin") for split in SPLITS}
    try:
        n_tokens = {split: write_tokens(temporary[split], parts[split], tokenizer) for split in SPLITS}
        meta = Meta(
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size).name,
            tokenizer=tokenizer.to_json(),
            train_tokens=n_tokens["train"],
            val_tokens=n_tokens["val"],
            source_name=text.source_name,
            source_sha256=text.sha256,
        )
        # Without this mark, files exchanged by half would pass for a dataset of nanoGPT's that has no meta at all.
        _replace(folder / "meta.json", json.dumps({"format_version": FORMAT_VERSION, "is_complete": False}))
        for split in SPLITS:
            temporary[split].replace(folder / f"{split}.bin")
        _replace(folder / "meta.json", meta.to_json())
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return PreparedInfo(folder, meta, was_up_to_date=False)


def _replace(path: Path, content: str) -> None:
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two nodes may prepare one shared folder


def _is_interrupted(folder: Path) -> bool:
    try:
        return json.loads((folder / "meta.json").read_bytes()).get("is_complete") is False
    except (ValueError, AttributeError):
        return False
