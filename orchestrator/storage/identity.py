"""Identity: whether two paths or URLs are one place. Asks no server."""

from __future__ import annotations

from pathlib import Path

from fsspec.implementations.local import LocalFileSystem


def is_on_disk(path_or_url: str) -> bool:
    """Return whether it is a path of this machine, on its own disk or on one that it has mounted."""
    protocol = path_or_url.partition("://")[0] if "://" in path_or_url else "file"
    return protocol in LocalFileSystem.protocol


def place_of(path_or_url: str) -> str:
    """Return a name that two paths or URLs of one place share, as far as it can be told without a server."""
    if is_on_disk(path_or_url):
        return str(Path(LocalFileSystem._strip_protocol(path_or_url)).resolve())
    return path_or_url.rstrip("/")
