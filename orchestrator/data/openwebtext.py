"""OpenWebText as nanoGPT prepares it: its documents through the library datasets, in the same split and order.

They come from the Hugging Face hub, or from files of the same layout: one column `text`, a document a row. This module
must not know tokens. Source of split, seed and order: nanoGPT, data/openwebtext/prepare.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.errors import CheckpointError, DataError
from orchestrator.storage.location import locate

logger = logging.getLogger(__name__)

OPENWEBTEXT = "openwebtext"
_HUB_NAME = "Skylion007/openwebtext"
_DOCUMENTS = 8_013_769
_VAL_SHARE, _SEED = 0.0005, 2357
_BUILDERS = {"parquet": "parquet", "jsonl": "json", "json": "json", "arrow": "arrow"}  # ending -> datasets' reader
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_AT_ONCE = 1000  # documents
_PROBE_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a split, in order."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[list[str]]:
        """Yield a thousand at a time.

        Raises:
            DataError: a row has no text.
        """
        for batch in self.rows.iter(batch_size=_AT_ONCE):
            if not all(isinstance(document, str) for document in batch["text"]):
                raise DataError("openwebtext: a row's column `text` holds no text")
            yield batch["text"]


@dataclass(frozen=True)
class Source:
    """Where the documents lie. load: reads them, with a folder for what is unpacked in between."""

    name: str
    sha256: str
    load: Callable[[str], Any]

    @contextmanager
    def opened(self, folder: Path) -> Iterator[dict[str, Documents]]:
        """Lend the splits `train` and `val`; what datasets writes to read files goes into folder, and away again.

        Raises:
            DataError: the documents cannot be had, or are not laid out as OpenWebText's.
        """
        scratch = tempfile.mkdtemp(prefix=".documents-", dir=folder)
        try:
            yield _split(self.load(scratch), self.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def are_documents(patterns: Sequence[str]) -> bool:
    """Return whether the files are of documents, by their endings.

    Raises:
        DataError: some are and some are not, or they are of several kinds.
    """
    kinds = {_builder(pattern) for pattern in patterns}
    if len(kinds) > 1:
        raise DataError(f"--text {' '.join(patterns)}: give files of one kind, .parquet, .jsonl, .arrow or texts")
    return kinds != {None}


def find_openwebtext(patterns: Sequence[str]) -> Source:
    """Return where OpenWebText's documents are: in the files that these name, else at the Hugging Face hub.

    Raises:
        DataError: datasets is not installed, or a file is not there.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError("prepare openwebtext needs a package: pip install 'nanogpt-orchestrator[openwebtext]'")
    if not patterns:
        name = "openwebtext of the Hugging Face hub"
        return Source(name, hashlib.sha256(name.encode()).hexdigest(), _load_from_hub)
    builder = _builder(patterns[0])
    files = [file for pattern in patterns for file in _files(pattern)]

    def load(scratch: str) -> Any:
        return _loaded(builder, data_files=[_escaped(file) for file in files], split="train", cache_dir=scratch)

    return Source(", ".join(patterns), _sha256(files), load)


def _builder(pattern: str) -> str | None:
    path = PurePosixPath(pattern)
    path = path.with_suffix("") if path.suffix in _PACKED else path
    return _BUILDERS.get(path.suffix.removeprefix("."))


def _files(pattern: str) -> list[str]:
    try:
        filesystem, path = locate(pattern)
        is_glob = any(sign in path for sign in "*?[") and not filesystem.exists(path)
        paths = sorted(filesystem.glob(path)) if is_glob else [path] if filesystem.isfile(path) else []
        found = [str(filesystem.unstrip_protocol(one)) for one in paths]
    except CheckpointError as error:
        raise DataError(f"cannot read the text {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the text {pattern}: {error}") from error
    if not found:
        raise DataError(f"--text {pattern} matches no file")
    return [file.removeprefix("file://") for file in found]


def _escaped(file: str) -> str:
    """Return a name in which datasets, too, sees no glob."""
    return re.sub(r"([*?[])", r"[\1]", file)


def _sha256(files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        filesystem, path = locate(file)
        with filesystem.open(path, "rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _load_from_hub(_scratch: str) -> Any:
    """Load all of it, 54 GB in datasets' own cache, where another program finds it as well."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:  # datasets would try for half a minute; now it looks into its cache only
        logger.info("%s does not answer (%s): datasets' cache is looked at", endpoint, error)
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        rows = _first_of_hub()
    except DataError as error:
        raise DataError(
            f"{error}. Either run this on a machine with a network, or give its files: "
            f"prepare openwebtext --text 'openwebtext/*.parquet' (or .jsonl, .arrow; one column `text`)"
        ) from error
    if len(rows) != _DOCUMENTS:
        logger.warning("the hub's openwebtext has %d documents, nanoGPT's has %d", len(rows), _DOCUMENTS)
    return rows


def _first_of_hub() -> Any:
    try:
        return _loaded(OPENWEBTEXT, split="train")
    except DataError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        logger.info("%s; its conversion to parquet is taken", error)  # datasets from 4 on runs no script of a dataset
        return _loaded(_HUB_NAME, revision="refs/convert/parquet", split="train")


def _loaded(builder: str | None, **options: Any) -> Any:
    from datasets import load_dataset  # imported here: it is slow, and an extra
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(builder, **options)
    except (DatasetsError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        cause = error.__cause__ or error
        raise DataError(f"openwebtext cannot be loaded: {type(cause).__name__}: {str(cause)[:300]}") from error


def _split(rows: Any, name: str) -> dict[str, Documents]:
    """Split as nanoGPT does, with its seed: a 2,000th for validation.

    Raises:
        DataError: there is no column `text`, or fewer than two documents.
    """
    if "text" not in rows.column_names:
        raise DataError(f"{name}: no column `text`, there are: {', '.join(rows.column_names)}")
    if len(rows) < 2:
        raise DataError(f"{name}: {len(rows)} documents are too few to split")
    splits = rows.select_columns("text").train_test_split(test_size=_VAL_SHARE, seed=_SEED, shuffle=True)
    return {"train": Documents(splits["train"]), "val": Documents(splits["test"])}
