"""Uploads that killed processes have left are deleted, and no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrainConfig
from orchestrator.storage.orphans import delete_orphans
from tests.conftest import Storage
from tests.support import faults, ranks
from tests.support.proxy import FaultyProxy
from tests.support.runs import checkpoints_in
from tests.support.servers import S3Server
from tests.support.storage_runs import Calm, Record, Run, check_whole, store_of


def test_unfinished_uploads_of_this_run_are_taken_back_and_no_others(
    large: TrainConfig, s3: Storage, s3_server: S3Server, tmp_path: Path, calm: Calm
) -> None:
    options: Record = {"key": s3_server.key, "secret": s3_server.secret, "endpoint_url": s3_server.endpoint}
    options["default_block_size"] = 5 * 2**20
    config = replace(large, out_dir=f"{s3.url}/run", storage_options=json.dumps(options))
    fault = faults.Fault("during", 8, 0, tmp_path / "fired", nth=2)  # the first file is sent in one piece
    killed = ranks.train(config, 1, tmp_path / "killed.log", [fault])
    assert fault.marker.exists(), killed.said
    store = store_of(config)
    bucket = store.folder.root.partition("/")[0]
    folders = {
        f"{tmp_path.name}/run": True,
        f"{tmp_path.name}/run-2": False,
        f"{tmp_path.name}": False,
    }
    keys = {f"{folder}/checkpoint_00000008_x/model": is_ours for folder, is_ours in folders.items()}
    for key in keys:
        store.folder.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    def unfinished() -> set[str]:
        page = store.folder.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=tmp_path.name)
        return {upload["Key"] for upload in page.get("Uploads", [])}

    ours = {key for key in unfinished() if key.startswith(f"{tmp_path.name}/run/")}
    assert [key for key in ours if "optimizer-" in key], "what the kill has left"
    assert ours | keys.keys() == unfinished()
    again = Run(config, "b").train()
    assert again.records[0]["from_storage_bytes"] == 0, "from node memory"
    assert unfinished() == {key for key, is_ours in keys.items() if not is_ours}
    check_whole(config, calm(config))


def test_unfinished_uploads_are_taken_back_however_many_an_answer_lists(
    s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = checkpoints_in(f"{s3.url}/run")
    bucket, _, folder = store.folder.root.partition("/")
    for number in range(5):
        key = f"{folder}/checkpoint_00000008_x/model-{number // 2}"  # two of one key
        store.folder.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    call, pages = store.folder.fs.call_s3, []

    def two_at_a_time(method: str, **arguments: Any) -> Any:
        if method != "list_multipart_uploads":
            return call(method, **arguments)
        pages.append(call(method, **arguments, MaxUploads=2))
        return pages[-1]

    monkeypatch.setattr(store.folder.fs, "call_s3", two_at_a_time)
    delete_orphans(store.folder)
    assert [len(page["Uploads"]) for page in pages] == [2, 2, 1]
    monkeypatch.undo()
    assert not store.folder.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=folder).get("Uploads")


def test_leftovers_that_cannot_be_listed_hold_up_nobody(on_s3: TrainConfig, proxy: FaultyProxy) -> None:
    refused = proxy.answer(501, "NotImplemented", lambda method, path: method == "GET" and "uploads" in path, 9)
    delete_orphans(store_of(on_s3).folder)
    assert refused.fired
