"""Keys expire and are renewed in mid-run; keys of two runs do not mix."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from orchestrator.driver.lease import LEASE_FILE, Lease
from orchestrator.errors import CheckpointError
from orchestrator.storage import location, retry
from orchestrator.storage.location import locate
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.run_folder import RunFolder
from tests.conftest import Storage
from tests.support.keys import write_keys
from tests.support.proxy import FaultyProxy
from tests.support.runs import checkpoints_in, metrics_in
from tests.support.servers import S3Server
from tests.support.storage_runs import iterations_of, run


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        pytest.param(403, "InvalidAccessKeyId", marks=pytest.mark.slow),
        (403, "AccessDenied"),
        pytest.param(403, "RequestExpired", marks=pytest.mark.slow),
    ],
)
def test_keys_that_are_renewed_in_mid_run_are_picked_up(
    status: int, code: str, config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    faults: list[Any] = []
    iterations = iter(range(10**6))

    def renew() -> None:
        if next(iterations) == 9:
            write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
            faults.append(proxy.expire(S3Server.key, status, code))

    with caplog.at_level(logging.INFO, "orchestrator"):
        records = run(config, each=renew)
    assert faults[0].fired
    assert iterations_of(records, "checkpoint_failed") == []
    assert iterations_of(records, "checkpoint")[-1] == 24
    assert {r["iter"] for r in metrics_in(config.out_dir) if r["kind"] == "step"} == set(range(24))
    store = checkpoints_in(config.out_dir)
    held = [name for name in store.names() if store.folder.fs.find(store.folder.path(name))]
    assert len(held) <= config.keep_checkpoints + 1
    told = [text for text in caplog.messages if "credentials are read again: " in text]
    assert len(told) == 1
    assert "metrics cannot be written" not in caplog.text
    assert S3Server.new_secret not in caplog.text


@pytest.mark.usefixtures("one_try")
def test_keys_that_are_renewed_late_are_waited_for(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They have expired, the next ones come later; meanwhile the file is there by half, and gone."""
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    store = checkpoints_in(config.out_dir)
    fault = proxy.expire(S3Server.key)
    contents = iter(["[default]\naws_access_key_id = te", None, None])

    def write_json() -> None:
        try:
            store.folder.write_json("run.json", {"a": 1})
        except CheckpointError:
            if (content := next(contents, "end")) == "end":
                write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
            elif content:
                keys_file.write_text(str(content))
            else:
                keys_file.unlink(missing_ok=True)
            raise

    with caplog.at_level(logging.INFO, "orchestrator"):
        store.folder.with_retries(write_json)
    assert fault.fired
    assert store.folder.read_json("run.json") == {"a": 1}
    assert len(caplog.messages) == 1, "said once"


@pytest.mark.usefixtures("one_try")
def test_keys_that_stay_expired_cost_checkpoints_and_not_the_run(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
    config = replace(config, out_dir=f"{faulty_s3.url}/run", checkpoint_interval=8)
    records: list[dict[str, Any]] = []
    faults: list[Any] = []

    def expire() -> None:
        if not faults and iterations_of(records, "step"):
            faults.append(proxy.expire(S3Server.key))
        if iterations_of(records, "checkpoint_failed"):
            proxy.heal()
        elif iterations_of(records, "step")[-1:] > [8]:
            time.sleep(0.2)

    run(config, each=expire, records=records)
    failed = [record for record in records if record["kind"] == "checkpoint_failed"]
    assert failed
    assert "the credentials have expired (ExpiredToken to PutObject" in failed[0]["why"]
    assert iterations_of(records, "step") == list(range(24))
    assert iterations_of(records, "checkpoint")[-1] == 24


@pytest.mark.usefixtures("one_try")
def test_keys_in_a_file_of_options_are_renewed_too(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"key": S3Server.key, "secret": S3Server.secret}))
    config = replace(config, out_dir=f"{faulty_s3.url}/run", storage_options=str(file))
    iterations = iter(range(10**6))

    def renew() -> None:
        if next(iterations) == 5:
            file.write_text(json.dumps({"key": S3Server.new_key, "secret": S3Server.new_secret}))
            proxy.expire(S3Server.key)

    records = run(config, each=renew)
    assert iterations_of(records, "checkpoint_failed") == []
    assert iterations_of(records, "checkpoint")[-1] == 24
    found = metrics_in(config.out_dir, storage_options_of(config))
    assert {r["iter"] for r in found if r["kind"] == "step"} == set(range(24))


@pytest.mark.usefixtures("one_try")
def test_a_driver_shows_life_with_the_new_keys(
    faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(f"{faulty_s3.url}/run")
    lease = Lease(folder, beat_interval_s=50)
    with lease.held():
        before = folder.read_json(LEASE_FILE)["beat"]
        proxy.expire(S3Server.key)
        write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
        lease.beat()
        assert folder.read_json(LEASE_FILE)["beat"] == before + 1
    assert not folder.read_json(LEASE_FILE)
    assert "cannot show" not in caplog.text


def test_keys_of_two_runs_do_not_mix(s3: Storage, config: TrainConfig) -> None:
    """A client whose keys were read again is one for all who have the same options, and for nobody else."""
    fs, _ = locate(s3.url)
    options = {"key": S3Server.new_key, "secret": S3Server.new_secret}
    other, _ = locate(s3.url, options)
    again, _ = location.renewed(fs, s3.url, None)
    assert again is not fs
    assert location.renewed(fs, s3.url, None)[0] is again, "once for all"
    assert locate(f"{s3.url}/run")[0] is again
    assert other.key == S3Server.new_key
    config = replace(config, out_dir=f"{s3.url}/run", max_iters=4)
    run(config)
    store = checkpoints_in(config.out_dir, options)
    assert tensors_equal(store.read(store.select()), checkpoints_in(config.out_dir).read(store.select()))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_keys_are_renewed_under_ray(
    tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny, out_dir=f"{faulty_s3.url}/run", max_failures=0, num_workers=2, max_iters=600)
    config = replace(config, checkpoint_interval=20, eval_interval=600)

    def renew() -> None:
        deadline_s = time.monotonic() + 120
        while not any(m == "PUT" and "checkpoint_" in path and "state.json" in path for m, path in proxy.traffic.seen):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
        faults.append(proxy.expire(S3Server.key))

    faults: list[Any] = []
    renewing = threading.Thread(target=renew)
    renewing.start()
    assert launch(config).iter_num == 600
    renewing.join()
    said = "".join(capfd.readouterr())
    assert faults[0].fired
    assert "was not saved" not in said
    assert "could not be written" not in said
    assert "cannot show" not in said
    assert 1 <= said.count("credentials are read again") <= 2
