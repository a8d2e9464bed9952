"""Orphans: the files of killed attempts besides checkpoint directories, which `CheckpointStore.prune` deletes.

An upload to an object store that is neither finished nor aborted lies there unseen, and is paid for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import is_refused, reason_of, translated
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.(run\.json|attempt\.json|report\.html)\.[0-9a-f]+\.tmp|\.writable(-\d+)?")


def delete_orphans(folder: RunFolder) -> None:
    """Delete them, at the beginning of an attempt: a late writer of an earlier one then fails. Never raises."""
    try:
        if hasattr(folder.fs, "call_s3"):  # other stores drop theirs in time
            with translated("orphans"):
                _abort_uploads(folder)
        for name in folder.list():
            if _TEMPORARY.fullmatch(name):
                folder.delete(name)
    except CheckpointError as error:  # they only take room, and some servers refuse to list them
        level = logging.DEBUG if is_refused(error) else logging.INFO  # that nothing can be deleted is told once
        logger.log(level, "leftovers in %s were not deleted: %s", folder.out_dir, reason_of(error.__cause__ or error))


def _abort_uploads(folder: RunFolder) -> None:
    """Abort the unfinished multipart uploads of this run, in S3."""
    bucket = folder.root.partition("/")[0]
    uploads = list(_unfinished(folder))
    for upload in uploads:
        folder.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    if uploads:
        logger.info("took back %d unfinished upload(s) of earlier attempts in %s", len(uploads), folder.out_dir)


def _unfinished(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """List all, of which an answer has a thousand at most."""
    bucket, _, prefix = folder.root.partition("/")
    where = {"Bucket": bucket, "Prefix": f"{prefix.rstrip('/')}/checkpoint_"}
    after: dict[str, str] = {}
    while True:
        page = folder.fs.call_s3("list_multipart_uploads", **where, **after)
        yield from page.get("Uploads", [])
        before, after = after, {key: page.get(f"Next{key}", "") for key in ("KeyMarker", "UploadIdMarker")}
        if not page.get("IsTruncated") or after == before:
            return
