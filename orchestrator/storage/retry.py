"""Retries: call again, with exponential backoff, what storage has failed at. Knows no file of ours."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import tenacity

from orchestrator.errors import CheckpointError
from orchestrator.storage.location import Connection
from orchestrator.storage.reasons import is_refused, is_transient, reason_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_FOR_S = 300.0  # from the first failure of a file; the next checkpoint begins anew
READ_AGAIN_FOR_S = 60.0
_LONGEST_PAUSE_S = 20.0
_REFUSALS = 2  # with credentials that were read again; not every server says that those before have expired


def with_retries(
    call: Callable[[], T],
    connection: Connection,
    may_pass: Callable[[BaseException], bool] | None = None,
    for_s: float | None = None,
) -> T:
    """Call `call`, retrying transient storage errors with exponential backoff for up to RETRY_FOR_S.

    Pauses are drawn at random, so that the ranks of a run do not all come back at the same moment.
    may_pass: the errors to retry, besides a refusal, after which we read the credentials again.

    Raises:
        Exception: call's last one.
    """
    failed_at_s: list[float] = []
    refused: list[BaseException] = []

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
            connection.reconnect(error, None if error and is_refused(error) else used)

    def is_worth_it(error: BaseException) -> bool:
        if (may_pass or is_transient)(error):
            return True
        if not is_refused(error) or connection.is_local:
            return False
        refused.append(error)
        return len(refused) <= _REFUSALS

    for attempt in tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_worth_it),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
        stop=is_enough,
        before_sleep=before_sleep,
        reraise=True,
    ):
        used = connection.fs
        with attempt:
            value = call()
    return value
