"""Location: the fsspec client and the path in it that a path or URL means. Knows no file and no run."""

from __future__ import annotations

import copy
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec import available_protocols, get_filesystem_class
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError, nearest
from orchestrator.storage.options import read_again
from orchestrator.storage.reasons import is_refused, reason_of, translated

logger = logging.getLogger(__name__)

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
_reconnecting = threading.RLock()  # one for all connections: it is rarely held

T = TypeVar("T")


class Connection:
    """The client of the storage in which a URL lies. We replace it when it is lost or when its credentials are refused.

    Threads share one: always ask for `fs` anew.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None) -> None:
        self._url, self._options = url, storage_options
        self.fs, self.path = locate(url, storage_options)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._is_shared = True  # fsspec hands out one client to all

    def call(
        self,
        what: str,
        function: Callable[..., T],
        *args: Any,
        to: type[CheckpointError] | None = None,
        advice: str = "",
    ) -> T:
        """Return function(fs, *args). If storage refuses us or the connection is lost, connect anew and call once more.

        what, to, advice: see `reasons.translated`.

        Raises:
            CheckpointError: the second one of function's, as one of ours.
        """
        used = self.fs
        try:
            with translated(what, to, advice):
                return function(used, *args)
        except CheckpointError as error:
            if self.is_local or not (is_refused(error) or _is_lost(used)):
                raise
            is_new = False
            with suppress(CheckpointError):  # still down: the second call says so
                is_new = self.reconnect(error, used)
            with translated(what, to, advice):
                value = function(self.fs, *args)
            if is_new and is_refused(error):
                logger.info("storage had refused us, credentials are read again: %s", reason_of(error.__cause__))
            return value

    def reconnect(self, error: BaseException | None = None, used: Any = None) -> bool:
        """Open a new connection to a server that keeps one. If storage has refused us, read the credentials again too.

        Return whether this call has made a new client.
        error: the failure. used: the client that failed; if another thread has replaced it since, that is enough.

        Raises:
            CheckpointError: the server is still down.
        """
        with _reconnecting:
            if self.is_local or (used is not None and used is not self.fs):
                return False
            if self.fs.async_impl:  # it connects for each request
                if error is None or not is_refused(error):
                    return False
                self.fs, self._options = renewed(self.fs, self._url, self._options)
                return True
            lost, self._options = self.fs, read_again(self._options)
            self.fs, _ = locate(self._url, {**(self._options or {}), "skip_instance_cache": True})
            if not self._is_shared and hasattr(lost, "client"):
                lost.client.close()  # of SSH: nobody else has it
            self._is_shared = False
            return True


def locate(url: str, storage_options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """Return the fsspec filesystem of a path or URL, and the path in it, in which no letter has a meaning of its own.

    Raises:
        CheckpointError: an unknown protocol, one whose package is not installed, storage options that do not fit, or
            a server that does not let us in.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    advice = "check the address, the credentials and storage_options"
    with translated(f"{url} cannot be opened", CheckpointError, advice):  # file servers are connected to at once
        try:
            return _connect(url, protocol, storage_options or {})
        except ImportError as error:
            package = f"nanogpt-orchestrator[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else ""
            remedy = f"pip install '{package}' on every node" if package else str(error)
            raise CheckpointError(f"{url}: the package for {protocol}:// is not installed: {remedy}") from None
        except ValueError as error:
            if protocol in available_protocols():
                raise CheckpointError(f"{url}: {error}") from None
            hint = nearest(protocol, _EXTRAS)
            told = f"{url}: no such protocol; give a path, or a URL such as s3://bucket/run{hint}"
            raise CheckpointError(told) from None


def check_place(fs: Any, path: str, url: str) -> None:
    """Check that we shall find again what we write there: object stores take a path letter by letter, or refuse it.

    Raises:
        CheckpointError: naming the part of the path that has to go.
    """
    if isinstance(fs, LocalFileSystem) or path.startswith("/") or "://" in path:
        return
    odd = next((part or "//" for part in path.split("/") if part in ("", ".", "..")), None)
    if "?versionId=" in path:
        raise CheckpointError(f"{url} names a version of an object: leave out ?versionId=... to write there")
    if odd:
        raise CheckpointError(f"{url} has {odd} in its path, which an object store does not resolve: leave it out")


def renewed(fs: Any, url: str, storage_options: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Return a client in place of one whose credentials are refused, and the options: both are read again.

    All who ask get the same one, and so do those who locate the URL from now on.

    Raises:
        CheckpointError: as `locate` does.
    """
    options = read_again(storage_options)
    with _reconnecting:
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
    if _is_lost(fs):
        fs.clear_instance_cache()
        fs, _ = url_to_fs(server, **options)
    # or every 32 KiB that is written waits for the 40 ms of a delayed acknowledgement
    fs.client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fs.ftp.get_channel().settimeout(_SFTP_SILENCE_S)
    if path.partition("/")[0] == "~":  # as with scp and git: the home folder there
        path = fs.ftp.normalize(".").strip("/") + path[1:]
    return fs, slash + path


def _is_lost(fs: Any) -> bool:
    """Return whether a client of SSH has no connection any more: the server went away, or somebody closed it."""
    get_transport = getattr(getattr(fs, "client", None), "get_transport", None)
    if get_transport is None:
        return False
    transport = get_transport()
    return transport is None or not transport.is_active()
