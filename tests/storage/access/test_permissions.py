"""Buckets in which we may not delete, write or list."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest

from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from orchestrator.driver.lease import Lease
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError
from orchestrator.storage.writable import PROBE_FILE
from tests.conftest import Storage, forget_clients
from tests.support.proxy import FaultyProxy
from tests.support.runs import checkpoints_in
from tests.support.servers import S3Server
from tests.support.storage_runs import iterations_of, run


def deletes(method: str, path: str) -> bool:
    return (method == "DELETE" and "uploadId" not in path) or (method == "POST" and path.endswith("?delete"))


@pytest.mark.usefixtures("one_try")
def test_a_bucket_in_which_nothing_can_be_deleted_is_warned_of_once(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    refused = proxy.answer(403, "AccessDenied", deletes, 10**6)
    saved = 0
    with caplog.at_level(logging.INFO, "orchestrator"):
        planned = plan(config)
        for attempt in ("a", "b"):
            lease = Lease(planned.folder, beat_interval_s=60)
            lease.wait_until_free()
            with lease.held():
                records = run(replace(config, max_iters=24 if attempt == "a" else 32), attempt)
            assert iterations_of(records, "checkpoint_failed") == []
            saved += len(iterations_of(records, "checkpoint"))
    assert refused.fired
    assert len([text for text in caplog.messages if "nothing can be deleted there (access denied" in text]) == 1
    assert [record for record in caplog.records if record.levelname == "WARNING"][1:] == []
    store = checkpoints_in(config.out_dir)
    assert len(store.names()) == saved > config.keep_checkpoints + 1, "all of them stay"
    assert [name for name in store.folder.list() if ".writable" in name] == [PROBE_FILE]
    Lease(store.folder, sleep=lambda _s: pytest.fail("it was given back")).wait_until_free()


@pytest.mark.usefixtures("one_try")
def test_who_has_no_driver_is_told_when_it_prunes(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.answer(403, "AccessDenied", deletes, 10**6)
    config = replace(config, out_dir=f"{faulty_s3.url}/run", keep_checkpoints=1)
    run(config, each=lambda: time.sleep(0.05))
    (told,) = [text for text in caplog.messages if "nothing can be deleted there" in text]
    assert "old checkpoints stay until you delete them" in told


@pytest.mark.usefixtures("one_try")
def test_a_checkpoint_that_cannot_be_deleted_can_be_withdrawn(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    store = checkpoints_in(f"{faulty_s3.url}/run")
    store.folder.write_json("checkpoint_00000004_a/state.json", {"damaged": 1})
    proxy.answer(403, "AccessDenied", deletes, 10**6)
    store.withdraw("checkpoint_00000004_a")
    assert store.load("checkpoint_00000004_a") is None
    assert store.names() == ["checkpoint_00000004_a"]


def test_a_bucket_that_may_only_be_read_is_evaluated_and_looked_at(
    s3: Storage, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, out_dir=f"{s3.url}/run", max_iters=4)
    run(config)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3Server.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3Server.reader_secret)
    forget_clients()
    with pytest.raises(CheckpointError, match=r"cannot be written: access denied \(AccessDenied to PutObject"):
        plan(replace(config, max_iters=8))
    evaluation = replace(config, eval_only=True)
    assert plan(evaluation).start.iter_num == 4
    assert iterations_of(run(evaluation, "b"), "eval") == [4]
    assert "metrics cannot be written" in caplog.text
    assert "whole, latest" in inspect(InspectConfig(out_dir=config.out_dir))


@pytest.mark.usefixtures("one_try")
def test_a_bucket_that_cannot_be_listed_is_refused(tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy) -> None:
    proxy.answer(403, "AccessDenied", lambda method, path: method == "GET" and "list-type" in path, 10**6)
    with pytest.raises(CheckpointError, match=r"cannot be read: access denied \(AccessDenied to ListObjectsV2"):
        plan(replace(tiny, out_dir=f"{faulty_s3.url}/run"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves
def test_ray_trains_where_nothing_can_be_deleted_and_evaluates_where_nothing_can_be_written(
    tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, out_dir=f"{faulty_s3.url}/lr=[1e-3] *?/run", max_failures=0, keep_checkpoints=1)
    refused = proxy.answer(403, "AccessDenied", deletes, 10**6)
    assert launch(replace(config, max_iters=8)).iter_num == 8
    assert launch(replace(config, max_iters=16)).iter_num == 16
    assert refused.fired
    store = checkpoints_in(config.out_dir)
    held = store.names()
    assert [held[0].split("_")[1], held[-1].split("_")[1]] == ["00000016", "00000004"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3Server.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3Server.reader_secret)
    forget_clients()
    assert launch(replace(config, max_iters=16, eval_only=True)).iter_num == 16
