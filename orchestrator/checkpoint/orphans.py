"""What killed attempts leave in storage besides checkpoint directories, which `CheckpointStore.prune` deletes.

An upload to an object store that is neither finished nor taken back lies there unseen, and is paid for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.storage.reasons import is_refused, reason_of

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.(run\.json|attempt\.json)\.[0-9a-f]+\.tmp|\.writable(-\d+)?")


def delete_orphans(store: CheckpointStore) -> None:
    """Delete them, at the beginning of an attempt: a late writer of an earlier one then fails. Never raises."""
    try:
        _abort_uploads(store)
        for path in store.fs.ls(store.root, detail=False):
            if _TEMPORARY.fullmatch(path.rsplit("/", 1)[-1]):
                store.fs.rm_file(path)
    except Exception as error:  # it is only clutter, and some servers refuse to list it
        level = logging.DEBUG if is_refused(error) else logging.INFO  # that nothing can be deleted is told once
        logger.log(level, "leftovers in %s were not deleted: %s", store.out_dir, reason_of(error))


def _abort_uploads(store: CheckpointStore) -> None:
    """Take back unfinished multipart uploads of this run: of S3 only, other stores drop theirs in time."""
    if not hasattr(store.fs, "call_s3"):
        return
    bucket = store.root.partition("/")[0]
    uploads = list(_unfinished(store))
    for upload in uploads:
        store.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    if uploads:
        logger.info("took back %d unfinished upload(s) of earlier attempts in %s", len(uploads), store.out_dir)


def _unfinished(store: CheckpointStore) -> Iterator[dict[str, Any]]:
    """List all, of which an answer has a thousand at most."""
    bucket, _, folder = store.root.partition("/")
    where = {"Bucket": bucket, "Prefix": f"{folder.rstrip('/')}/checkpoint_"}
    after: dict[str, str] = {}
    while True:
        page = store.fs.call_s3("list_multipart_uploads", **where, **after)
        yield from page.get("Uploads", [])
        before, after = after, {key: page.get(f"Next{key}", "") for key in ("KeyMarker", "UploadIdMarker")}
        if not page.get("IsTruncated") or after == before:
            return
