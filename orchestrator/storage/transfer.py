"""Single files between this machine and a path or fsspec URL, for the formats that other programs read.

A file appears whole or not at all. Nothing here knows what is in a file.
"""

from __future__ import annotations

import copy
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec import available_protocols, get_filesystem_class
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError, nearest
from orchestrator.storage.options import read_again
from orchestrator.storage.reasons import lacks_bucket, reason_of

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_EXTRAS |= {"sftp": "sftp", "ssh": "sftp"}
# paramiko would wait for the system, two minutes or for ever
_SFTP_LIMITS_S = {"timeout": 10.0, "banner_timeout": 20.0, "auth_timeout": 20.0}
_SFTP_SILENCE_S = 60.0  # a server that says nothing for so long while it is asked for something is taken for dead
# s3fs would do five times what botocore tries five times: 400 s for a request that is never answered. Both are needed:
# botocore knows which answers may pass (s3fs not 500), s3fs tries again what breaks in the body of an answer.
_S3_LIMITS = {
    "connect_timeout": 5.0,
    "read_timeout": 15.0,
    "retries": {"mode": "standard", "total_max_attempts": 3},
}
_S3_ROUNDS = 2
_renewing = threading.Lock()


def exists(url: str, storage_options: dict[str, Any] | None = None) -> bool:
    """Return whether there is a file or folder.

    Raises:
        CheckpointError: storage that cannot be reached.
    """
    fs, path = locate(url, storage_options)
    try:
        return is_there(fs, path)
    except Exception as error:  # every storage library has exceptions of its own
        raise CheckpointError(f"{url} cannot be looked for: {reason_of(error)}") from error


def is_there(fs: Any, path: str) -> bool:
    """Return whether there is a file or folder; fsspec's `exists` says no as well where a server does not answer."""
    try:
        fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if lacks_bucket(error):
            raise
        return False
    return True


@contextmanager
def local_copy(url: str, storage_options: dict[str, Any] | None = None) -> Iterator[Path]:
    """Lend a file as one on this machine: itself where it is local, else a copy that is deleted afterwards.

    Raises:
        CheckpointError: no such file, or storage that cannot be reached.
    """
    fs, path = locate(url, storage_options)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).is_file():
            raise CheckpointError(f"{url}: no such file; check the path")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, Path(path).name)
        try:
            fs.get_file(path, str(copy))
        except Exception as error:  # every storage library has exceptions of its own
            if isinstance(error, FileNotFoundError) and not lacks_bucket(error):
                raise CheckpointError(f"{url}: no such file; check bucket and path") from error
            raise CheckpointError(f"{url}: cannot be fetched: {reason_of(error)}") from error
        yield copy


@contextmanager
def atomic_write(url: str, storage_options: dict[str, Any] | None = None, *, is_lasting: bool = True) -> Iterator[Path]:
    """Lend a scratch file to write, and put it in its place once the block ends without an error.

    Local: a temporary name beside it, then a rename. Object stores, which cannot rename: one put, checked by size.
    is_lasting: on a local disk, wait until no power cut could take it back, which on a busy disk is a second or more.

    Raises:
        CheckpointError: the file could not be written; what was at the url before is still there.
    """
    fs, path = locate(url, storage_options)
    check_place(fs, path, url)
    try:
        if isinstance(fs, LocalFileSystem):
            with _renamed_onto(Path(path), is_lasting) as scratch_file:
                yield scratch_file
            return
        with tempfile.TemporaryDirectory() as scratch:
            scratch_file = Path(scratch, Path(path).name)
            yield scratch_file
            make_folder(fs, fs._parent(path))
            fs.put_file(str(scratch_file), path)
            fs.invalidate_cache()
            if fs.size(path) != scratch_file.stat().st_size:  # some clients report success for half a file
                raise OSError(f"{fs.size(path)} of {scratch_file.stat().st_size} bytes arrived")
    except CheckpointError:
        raise
    except Exception as error:  # every storage library has exceptions of its own
        raise CheckpointError(
            f"{url}: cannot be written: {reason_of(error)}; check permissions and free space"
        ) from error


@contextmanager
def _renamed_onto(path: Path, is_lasting: bool) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # two nodes may have equal process ids
    try:
        yield temporary
        if is_lasting:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # the content must be on disk before the name is
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(fs: Any, path: str) -> None:
    """Make a folder on file servers. On object stores there are none, and theirs would make a mistyped bucket."""
    if not path.startswith("/"):
        return
    try:
        fs.makedirs(path, exist_ok=True)
    except OSError:  # over SFTP: another rank has made it since this one looked
        if not fs.isdir(path):
            raise


def check_place(fs: Any, path: str, url: str) -> None:
    """Check that what is written there can be found again: object stores take a path letter by letter, or refuse it.

    Raises:
        CheckpointError: naming what has to go.
    """
    if isinstance(fs, LocalFileSystem) or path.startswith("/") or "://" in path:
        return
    odd = next((part or "//" for part in path.split("/") if part in ("", ".", "..")), None)
    if "?versionId=" in path:
        raise CheckpointError(f"{url} names a version of an object: leave out ?versionId=... to write there")
    if odd:
        raise CheckpointError(f"{url} has {odd} in its path, which an object store does not resolve: leave it out")


def locate(url: str, storage_options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """Return the fsspec filesystem of a path or URL, and the path in it, in which no letter has a meaning of its own.

    Raises:
        CheckpointError: an unknown protocol, one whose package is not installed, storage options that do not fit, or
            a server that does not let us in.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    try:
        fs, path = _connect(url, protocol, storage_options or {})
    except ImportError as error:
        package = f"nanogpt-orchestrator[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else ""
        remedy = f"pip install '{package}' on every node" if package else str(error)
        raise CheckpointError(f"{url}: the package for {protocol}:// is not installed: {remedy}") from None
    except ValueError as error:
        if protocol in available_protocols():
            raise CheckpointError(f"{url}: {error}") from None
        hint = nearest(protocol, _EXTRAS)
        raise CheckpointError(f"{url}: no such protocol; give a path, or a URL such as s3://bucket/run{hint}") from None
    except Exception as error:  # file servers are connected to at once, and every library has exceptions of its own
        raise CheckpointError(
            f"{url} cannot be opened: {reason_of(error)}; check the address, the credentials and storage_options"
        ) from error
    return fs, path


def renewed(fs: Any, url: str, storage_options: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Return a client in place of one whose credentials are refused, and the options: both are read again.

    All who ask get the same one, and so do those who locate the URL from now on.

    Raises:
        CheckpointError: as `locate` does.
    """
    options = read_again(storage_options)
    with _renewing:
        again, _ = locate(url, options)
        if again is fs:  # nobody has asked before
            fs.clear_instance_cache()
            again, _ = locate(url, options)
    return again, options


def _connect(url: str, protocol: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Ask fsspec, which hands out one client for equal options again and again, dead or alive.

    It is not given the whole URL where that is one: it would take `::` in a path for a chain, and cut it off at `?`.
    """
    if protocol in ("sftp", "ssh"):
        return _connect_sftp(url, {**_SFTP_LIMITS_S, **options})
    if url.partition("::")[0] in available_protocols():  # a chain, such as simplecache::s3://
        return url_to_fs(url, **options)  # type: ignore[no-any-return]
    kind = get_filesystem_class(protocol or "file")
    path = kind._strip_protocol(url)
    if kind is LocalFileSystem and ".." in path.split("/"):
        path = str(Path(path).resolve())  # the system follows links before it goes up
    if protocol not in ("s3", "s3a"):
        return kind(**{**kind._get_kwargs_from_urls(url), **options}), path
    if path.startswith("/"):
        raise ValueError("there is no bucket in it: s3://bucket/run")
    if "?versionId=" in path:
        options = {"version_aware": True, **options}
    options = copy.deepcopy(options)  # botocore writes into them, and what is equal now would not be so then
    if "config_kwargs" in options:
        return kind(**options), path
    fs = kind(**options, config_kwargs=copy.deepcopy(_S3_LIMITS))
    fs.retries = _S3_ROUNDS
    return fs, path


def _connect_sftp(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    server = f"{scheme}://{host}/"
    fs, _ = url_to_fs(server, **options)
    transport = fs.client.get_transport()
    if transport is None or not transport.is_active():  # the server went away, or the connection was cut
        fs.clear_instance_cache()
        fs, _ = url_to_fs(server, **options)
    # or every 32 KiB that is written waits for the 40 ms of a delayed acknowledgement
    fs.client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fs.ftp.get_channel().settimeout(_SFTP_SILENCE_S)
    if path.partition("/")[0] == "~":  # as with scp and git: the home folder there
        path = fs.ftp.normalize(".").strip("/") + path[1:]
    return fs, slash + path
