"""Prepare a dataset: text to token files, split as nanoGPT splits it.

The folder is never half of one text and half of another: while its files are exchanged, meta.json says that the
preparation did not finish. This module must not know training.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from orchestrator.config import GPT2_NAMES
from orchestrator.data.file_tokenizer import TOKENIZER_FILE, FileTokenizer
from orchestrator.data.openwebtext import OPENWEBTEXT, Documents, are_documents, find_openwebtext
from orchestrator.data.texts import Text, expected_sha256, read_own_text, read_texts
from orchestrator.data.token_files import FORMAT_VERSION, SPLITS, Meta, open_token_files, read_meta
from orchestrator.data.token_ids import token_dtype
from orchestrator.data.token_writer import write_documents, write_tokens
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from orchestrator.errors import DataError, nearest

logger = logging.getLogger(__name__)

_TOKENIZER_OF = {"shakespeare_char": "char", "shakespeare": "gpt2", "quickstart": "char"}
_GPT2_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and from which text."""

    name: str
    """Dataset to make; quickstart, shakespeare_char, shakespeare and openwebtext bring their own text."""
    text: tuple[str, ...] = ()
    """Paths, globs or URLs (s3://, gs://, https://) of text, joined in this order; of openwebtext: of its .parquet,
    .jsonl or .arrow files."""
    tokenizer: str | None = None
    """char (one token per character), gpt2 (GPT-2's BPE), or a Hugging Face folder that has one, a path or URL;
    default: gpt2, char for quickstart and shakespeare_char."""
    data_dir: str = "data"
    """Folder that holds the datasets, each in a folder of its name."""
    overwrite: bool = False
    """Write the files anew, whatever the folder holds."""
    end_of_text: bool = False
    """Put the end-of-text token between files, and where a text has it; else it is text like any other."""


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


@dataclass(frozen=True)
class _Wanted:
    """What the folder is to hold. tokenizer: None is one of the characters that the text has."""

    folder: Path
    tokenizer: Tokenizer | None
    end_of_text: bool

    def is_in(self, meta: Meta) -> bool:
        its = meta.tokenizer
        is_its = its == self.tokenizer.to_json() if self.tokenizer else its["kind"] == "char"
        return is_its and meta.end_of_text == self.end_of_text

    def __str__(self) -> str:
        kind = self.tokenizer.to_json()["kind"] if self.tokenizer else "char"
        return f"{kind} tokens of this text{' with end-of-text tokens' if self.end_of_text else ''}"


def prepare(config: PrepareConfig) -> PreparedInfo:
    """Turn a text into the token files of one dataset folder, or find that they are there already.

    Raises:
        DataError: the name, the text or the tokenizer is not usable, or the folder holds another dataset and
            `overwrite` is not set.
    """
    if PurePath(config.name).name != config.name or config.name in ("", ".", ".."):
        raise DataError(f"a dataset's name is the name of a folder in data_dir, not {config.name!r}")
    folder = Path(config.data_dir).expanduser() / config.name
    word = config.tokenizer or _TOKENIZER_OF.get(config.name, "gpt2")
    wanted = _Wanted(folder, None if word == "char" else _named_tokenizer(word), config.end_of_text)
    if config.end_of_text and (wanted.tokenizer is None or wanted.tokenizer.end_of_text is None):
        raise DataError(f"end_of_text=True, but the tokenizer {word} has no end-of-text token; gpt2 has one")
    try:
        if config.name == OPENWEBTEXT and (not config.text or are_documents(config.text)):
            return _prepare_documents(config, wanted)
        return _prepare_text(config, wanted)
    except OSError as error:  # no permission, a full disk
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror}") from None


def _named_tokenizer(word: str) -> Tokenizer:
    """Return the tokenizer of GPT-2, or of a folder.

    Raises:
        DataError: there is none.
    """
    if word in GPT2_NAMES:  # all sizes have the same
        return GPT2Tokenizer()
    folder = word.removesuffix(f"/{TOKENIZER_FILE}")
    if "://" not in folder:
        folder = str(Path(folder).expanduser())
        if not Path(folder).is_dir():
            raise DataError(
                f"tokenizer={word!r} is neither char, gpt2 nor a folder here (or a URL) with tokenizer.json, or with "
                f"vocab.json and merges.txt{nearest(word, ('char', 'gpt2'))}"
            )
    found = read_tokenizer_folder(folder)
    if found is None:
        raise DataError(f"tokenizer={word}: it holds no tokenizer.json, and not both of vocab.json and merges.txt")
    return found


def _prepare_text(config: PrepareConfig, wanted: _Wanted) -> PreparedInfo:
    known_sha256 = None if config.text or config.end_of_text else expected_sha256(config.name)
    if known_sha256 and not config.overwrite and (info := _existing(wanted, known_sha256)):
        return info  # the text need not even be downloaded
    text = read_texts(config.text) if config.text else read_own_text(config.name)
    sha256 = text.documents_sha256 if config.end_of_text else text.sha256
    tokenizer = wanted.tokenizer or (CharTokenizer.of_text(text.content) if text.content else None)
    end = _end_of_text(text, tokenizer, is_token=config.end_of_text)
    if not config.overwrite and (info := _existing(wanted, sha256)):
        return info
    content = _with_ends(text, end) if end else text.content
    at = _split_at(content, end)
    if at == 0 or at == len(content) or tokenizer is None:
        raise DataError(f"the text of {wanted.folder} has {len(content)} characters, too few to split 90 to 10")
    parts = {"train": content[:at], "val": content[at:]}

    def write(split: str, path: Path) -> int:
        return write_tokens(path, parts[split], tokenizer, end)

    return _write(wanted, tokenizer, text.source_name, sha256, write)


def _prepare_documents(config: PrepareConfig, wanted: _Wanted) -> PreparedInfo:
    tokenizer = wanted.tokenizer
    if tokenizer is None or tokenizer.end_of_text is None:
        raise DataError(f"{config.name}: the tokenizer has no token to put after each document; gpt2 has one")
    end = tokenizer.decode([tokenizer.end_of_text]) if config.end_of_text else ""
    source = find_openwebtext(config.text)
    if not config.overwrite and (info := _existing(wanted, source.sha256)):
        return info
    wanted.folder.parent.mkdir(parents=True, exist_ok=True)
    with source.opened(wanted.folder.parent) as splits:

        def write(split: str, path: Path) -> int:
            found: Documents = splits[split]
            return write_documents(path, found.batches(), len(found), tokenizer, end)

        return _write(wanted, tokenizer, source.name, source.sha256, write)


def _end_of_text(text: Text, tokenizer: Tokenizer | None, *, is_token: bool) -> str:
    """Return what the text has where the end-of-text token is to stand, empty if nowhere; say how often it is there."""
    end = tokenizer.end_of_text if tokenizer else None
    is_other = isinstance(tokenizer, FileTokenizer)  # asking GPT-2's needs its vocabulary
    word = tokenizer.decode([end]) if tokenizer and end is not None and is_other else _GPT2_END_OF_TEXT
    count, n_files = text.content.count(word), len(text.starts)
    if is_token:
        where = f"and between {n_files} files" if n_files > 1 else "and nowhere else"
        logger.info("%s: %d in the text; the end-of-text token stands there %s", word, count, where)
        return word
    if end is None and count:
        logger.warning("%s: %d in the text, as its characters: this vocabulary has no such token", word, count)
    elif end is not None and (count or n_files > 1):
        logger.warning(
            "%s: %d in the text, encoded as text like any other, and none between files (%d): "
            "--end_of_text puts the end-of-text token in both places",
            *(word, count, n_files),
        )
    elif end is not None:
        logger.info("%s: 0 in the text", word)
    return ""


def _with_ends(text: Text, end: str) -> str:
    """Return the files joined with one end of text between any two."""
    joined: list[str] = []
    for document in text.documents:
        is_ended = not joined or joined[-1].rstrip().endswith(end) or document.lstrip().startswith(end)
        joined += [document] if is_ended else [end, document]
    return "".join(joined)


def _split_at(content: str, end: str) -> int:
    """Return where the last tenth begins, in characters, as in nanoGPT; not within an end of text."""
    at = int(len(content) * 0.9)
    begin = content.find(end, max(at - len(end) + 1, 0), at + len(end) - 1) if end else -1
    return begin + len(end) if 0 <= begin < at else at


def _existing(wanted: _Wanted, sha256: str) -> PreparedInfo | None:
    """Return what the folder holds where that is what is wanted, None where nothing is lost by writing it."""
    folder = wanted.folder
    if not any((folder / file).exists() for file in ("meta.json", "meta.pkl", "train.bin", "val.bin")):
        return None
    try:
        meta = read_meta(folder)
    except DataError as error:
        if _is_interrupted(folder):
            return None
        raise DataError(f"{error}; --overwrite writes the folder anew") from error
    if meta and meta.source_sha256 == sha256 and wanted.is_in(meta):
        return _up_to_date(folder, meta)
    raise _other(wanted, meta, sha256)


def _other(wanted: _Wanted, meta: Meta | None, sha256: str) -> DataError:
    holds = "token files that nanoGPT made"
    if meta:
        ends = " with end-of-text tokens" if meta.end_of_text else ""
        holds = f"{meta.tokenizer['kind']} tokens of {meta.source_name}{ends}"
    return DataError(
        f"{wanted.folder} already holds {holds}, not {wanted} (SHA-256 {sha256[:12]}...); choose another "
        f"name, or replace it with --overwrite"
    )


def _up_to_date(folder: Path, meta: Meta) -> PreparedInfo | None:
    try:
        open_token_files(folder.parent, folder.name)
    except DataError as error:
        logger.warning("preparing %s again, because %s", folder, error)
        return None
    return PreparedInfo(folder, meta, was_up_to_date=True)


def _write(
    wanted: _Wanted, tokenizer: Tokenizer, source_name: str, sha256: str, write: Callable[[str, Path], int]
) -> PreparedInfo:
    """Write the folder. write: writes a split's tokens to a path and returns how many there are."""
    folder = wanted.folder
    tokenizer.encode("")  # finds out now whether the vocabulary can be had, before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {split: _temporary(folder / f"{split}.bin") for split in SPLITS}
    try:
        n_tokens = {split: write(split, temporary[split]) for split in SPLITS}
        meta = Meta(
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size).name,
            tokenizer=tokenizer.to_json(),
            train_tokens=n_tokens["train"],
            val_tokens=n_tokens["val"],
            source_name=source_name,
            source_sha256=sha256,
            end_of_text=wanted.end_of_text,
        )
        # Without this mark, files exchanged by half would pass for a dataset of nanoGPT's that has no meta at all.
        _replace(folder / "meta.json", json.dumps({"format_version": FORMAT_VERSION, "is_complete": False}))
        for split in SPLITS:
            temporary[split].replace(folder / f"{split}.bin")
        if isinstance(tokenizer, FileTokenizer):
            _replace(folder / TOKENIZER_FILE, tokenizer.content)
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
