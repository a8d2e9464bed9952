"""Names with any letters mean themselves, in every operation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError
from orchestrator.storage.location import locate
from orchestrator.storage.transfer import atomic_write, delete_folder, exists, local_copy
from orchestrator.storage.writable import check_writable
from orchestrator.telemetry.metrics import MetricsLog
from orchestrator.telemetry.records import Note, Stamped
from tests.conftest import Storage
from tests.support.runs import checkpoints_in, metrics_in
from tests.support.servers import S3Server
from tests.support.storage_runs import iterations_of, run

ODD_NAMES = (
    "lr=[1e-3]",
    "a*b",
    "who?",
    "{a,b}",
    "run #1",
    "100%20 a+b&c=d;e,f",
    "größe-β",
    "mid~dle",
    "a::b",
    'it\'s "so"',
    "-rf",
)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_has_no_meaning_but_itself(name: str, place: Storage) -> None:
    out_dir = f"{place.url}/{name}/run"
    store = checkpoints_in(out_dir, place.options)
    check_writable(store.folder)
    assert store.folder.root.endswith(f"/{name}/run")
    with atomic_write(f"{out_dir}/checkpoint_00000004_a/state.json", place.options) as file:
        file.write_text("{}")
    assert store.names() == ["checkpoint_00000004_a"]
    assert exists(f"{out_dir}/checkpoint_00000004_a/state.json", place.options)
    with local_copy(f"{out_dir}/checkpoint_00000004_a/state.json", place.options) as copy:
        assert copy.read_text() == "{}"
    log = MetricsLog(store.folder, "a")
    log.write(Stamped(Note(text="a line"), 1000.0))
    log.close()
    assert len(metrics_in(out_dir, place.options)) == 1
    store.delete_checkpoint("checkpoint_00000004_a")
    assert store.names() == []


@pytest.mark.parametrize(("name", "other"), [("run[12]", "run1"), ("r*", "run"), ("r?n", "run"), ("[a-z]", "b")])
def test_what_a_pattern_would_match_stays(name: str, other: str, place: Storage) -> None:
    folders = [f"{name}/checkpoint_x", f"{name}/checkpoint_x2", f"{other}/checkpoint_x"]
    for folder in folders:
        for file in ("f", "deeper/g"):
            with atomic_write(f"{place.url}/{folder}/{file}", place.options) as scratch:
                scratch.write_text(folder)
    fs, path = locate(f"{place.url}/{name}/checkpoint_x", place.options)
    delete_folder(fs, path)
    there = [folder for folder in folders if exists(f"{place.url}/{folder}/deeper/g", place.options)]
    assert there == folders[1:]
    assert [folder for folder in folders if exists(f"{place.url}/{folder}/f", place.options)] == folders[1:]


def test_a_run_in_such_a_folder_keeps_no_more_than_it_should(
    s3: Storage, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, out_dir=f"{s3.url}/lr=[1e-3],b=*/run")
    neighbour = replace(config, out_dir=f"{s3.url}/lr=1,b=2/run", max_iters=4)
    run(neighbour)
    assert len(iterations_of(run(config), "checkpoint")) >= 3
    store = checkpoints_in(config.out_dir)
    held = [name for name in store.names() if store.folder.fs.find(store.folder.path(name))]
    assert len(held) <= config.keep_checkpoints + 1
    assert len(checkpoints_in(neighbour.out_dir).names()) == 1
    assert "were not deleted" not in caplog.text


@pytest.mark.parametrize("path", ["a//b", "a/./b", "a/../b"])
def test_a_path_that_an_object_store_does_not_resolve_is_refused(path: str, s3: Storage, tiny: TrainConfig) -> None:
    odd = path[2:-2] or "//"
    with pytest.raises(CheckpointError, match=rf"has {odd.replace('.', '[.]')} in its path".replace("[//]", "//")):
        plan(replace(tiny, out_dir=f"{s3.url}/{path}"))
    with pytest.raises(CheckpointError, match="leave it out"), atomic_write(f"{s3.url}/{path}"):
        pass


def test_a_version_of_an_object_is_read_and_not_written(s3: Storage, s3_server: S3Server, tiny: TrainConfig) -> None:
    fs, _ = locate(s3.url)
    bucket = f"versioned-{Path(s3.url).name[-20:].replace('_', '-')}"
    fs.call_s3("create_bucket", Bucket=bucket)
    fs.make_bucket_versioned(bucket)
    first = fs.pipe_file(f"{bucket}/file", b"first")["VersionId"]
    fs.pipe_file(f"{bucket}/file", b"second")
    url = f"s3://{bucket}/file?versionId={first}"
    with local_copy(url) as copy:
        assert copy.read_bytes() == b"first"
    with pytest.raises(CheckpointError, match="names a version of an object"):
        plan(replace(tiny, out_dir=url))
    with pytest.raises(CheckpointError, match="names a version of an object"), atomic_write(url):
        pass
    config = replace(tiny, out_dir=f"s3://{bucket}/run", max_iters=12)
    run(config)
    assert 1 <= len(checkpoints_in(config.out_dir).names()) <= config.keep_checkpoints + 1
    assert s3_server.secret not in url


def test_dots_on_a_disk_and_a_server_are_resolved_there(tmp_path: Path, sftp: Storage) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    assert checkpoints_in(f"{tmp_path}/link/../run").folder.root == f"{tmp_path}/real/run"
    fs, path = locate(f"{sftp.url.replace(sftp.url.split('127.0.0.1')[1][6:], '')}/~/x", sftp.options)
    assert path == f"{fs.ftp.normalize('.').rstrip('/')}/x"
    assert locate(f"{sftp.url}/who?/x#y", sftp.options)[1].endswith("/who?/x#y")
