"""Retries: what is transient is tried again, later and later. Knows the library's exceptions and no file of ours."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import tenacity
from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError, StorageUnavailableError
from orchestrator.storage.reasons import has_expired, is_refused, reason_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_FOR_S = 300.0  # from the first failure of a file; the next checkpoint begins anew
READ_AGAIN_FOR_S = 60.0
_LONGEST_PAUSE_S = 20.0
_REFUSALS = 2  # with credentials that were read again; not every server says that those before have expired
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}


class Reconnectable(Protocol):
    """What is called storage here: a client that can be replaced by a new one."""

    fs: Any

    def reconnect(self, error: BaseException | None = None) -> None:
        """Open a new connection; error: what has failed."""


def with_retries(
    call: Callable[[], T],
    store: Reconnectable,
    may_pass: Callable[[BaseException], bool] | None = None,
    for_s: float | None = None,
) -> T:
    """Return call()'s value; while it fails for what may pass, call again, later and later, for RETRY_FOR_S in all.

    Pauses are drawn at random, so that the ranks of a run do not all come back at the same moment.

    Raises:
        Exception: the last one of the storage's.
    """

    failed_at_s: list[float] = []

    def is_enough(_attempt: tenacity.RetryCallState) -> bool:
        failed_at_s.append(time.monotonic())  # a large file may take longer than that before it fails first
        return failed_at_s[-1] - failed_at_s[0] >= (RETRY_FOR_S if for_s is None else for_s)

    def before_sleep(attempt: tenacity.RetryCallState) -> None:
        error, number = attempt.outcome.exception() if attempt.outcome else None, attempt.attempt_number
        if not error or not is_refused(error):
            logger.info("storage failed, trying again (%d): %s", number, reason_of(error))
        elif number == 1:
            logger.info("storage has refused us, credentials are read again: %s", reason_of(error))
        with suppress(CheckpointError):  # still down: the next call says so
            store.reconnect(error)

    refused: list[BaseException] = []

    def is_worth_it(error: BaseException) -> bool:
        if (may_pass or is_transient)(error):
            return True
        if not is_refused(error) or isinstance(store.fs, LocalFileSystem):
            return False
        refused.append(error)
        return len(refused) <= _REFUSALS

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_worth_it),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
        stop=is_enough,
        before_sleep=before_sleep,
        reraise=True,
    )
    return retry(call)


def read_with_retries(call: Callable[[], T], store: Reconnectable) -> T:
    """Return call()'s value; where storage does not answer, ask again for a while: an older state costs more.

    Raises:
        StorageUnavailableError: it has not answered for READ_AGAIN_FOR_S.
    """
    return with_retries(call, store, lambda error: isinstance(error, StorageUnavailableError), READ_AGAIN_FOR_S)


def is_transient(error: BaseException) -> bool:
    """Return whether a fault may pass by itself: all but what a storage says of permissions and room, and our bugs.

    What is not found may be there in the next attempt: a folder, or a multipart upload that the server has forgotten.
    Over SFTP a full disk is tried again as well: the protocol says "Failure" to that as to much else. Credentials that
    have expired may have been renewed by somebody, and are read again.
    """
    if has_expired(error):
        return True
    root: BaseException | None = error
    while root:
        if isinstance(root, (PermissionError, NotADirectoryError, IsADirectoryError)):
            return False
        if isinstance(root, OSError) and root.errno in _LASTING:
            return False
        root = root.__cause__
    return isinstance(error, Exception) and not isinstance(error, (TypeError, AttributeError, LookupError))
