"""storage_options: read with clear errors, given to everything that opens out_dir, and kept out of what is written."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.__main__ import main
from orchestrator.checkpoint.restore.init_from import check_start
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.commands.export import ExportConfig
from orchestrator.commands.inspect_run import InspectConfig
from orchestrator.commands.sample import SampleConfig
from orchestrator.config import TrainConfig, parse
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.storage.location import locate
from orchestrator.storage.options import GIVEN_INLINE, Secret, redacted, storage_options_of
from orchestrator.storage.run_folder import RunFolder, open_run_folder
from orchestrator.storage.transfer import make_folder
from orchestrator.telemetry.emit import open_telemetry
from orchestrator.telemetry.metrics import MetricsLog
from orchestrator.telemetry.records import Note, Stamped
from orchestrator.worker.job import Job
from tests.support.runs import checkpoints_in

SECRET = "s3cr3t-value"
INLINE = json.dumps({"key": "me", "secret": SECRET})


@pytest.fixture
def options_file(tmp_path: Path) -> str:
    path = tmp_path / "options.json"
    path.write_text(INLINE, encoding="utf-8")
    return str(path)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return the options with which file systems in memory are made; none that was made before is used again."""
    found: list[Any] = []
    init = MemoryFileSystem.__init__

    def noting(self: Any, *args: Any, **options: Any) -> None:
        found.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "__init__", noting)
    MemoryFileSystem.clear_instance_cache()
    yield found
    MemoryFileSystem.clear_instance_cache()


def test_options_are_read_from_the_setting_or_a_file(options_file: str) -> None:
    assert storage_options_of(TrainConfig()) is None
    for text in (INLINE, f" {INLINE} ", options_file):
        assert storage_options_of(TrainConfig(storage_options=text)) == {"key": "me", "secret": SECRET}


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig, ExportConfig, InspectConfig])
def test_every_command_has_the_setting(kind: type[Any], options_file: str) -> None:
    config = parse(kind, [f"--storage_options={options_file}"], "test")
    assert storage_options_of(config) == {"key": "me", "secret": SECRET}


def test_other_storage_does_not_get_them() -> None:
    config = ExportConfig(out_dir="s3://bucket/run", storage_options=INLINE)
    assert storage_options_of(config, "s3://other/ckpt.pt") == {"key": "me", "secret": SECRET}
    assert storage_options_of(config, "gs://other/ckpt.pt") is None
    assert storage_options_of(config, "out/ckpt.pt") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"secret": "{SECRET}"', r"storage_options is not JSON \(character \d+\): give a JSON object"),
        (f'["{SECRET}"]', "storage_options is no JSON object: give a JSON object"),
        (SECRET, r"storage_options is not JSON \(character 1\): give a JSON object"),
        ("none.json", "storage_options=none.json cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_named_and_its_value_is_not(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        storage_options_of(TrainConfig(storage_options=text))
    assert SECRET not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    for content in (INLINE[:-3].encode(), b"[]", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=str(path)) as caught:
            storage_options_of(TrainConfig(storage_options=str(path)))
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "line", [f"storage_options = {INLINE}", f"storage_option = {INLINE}", f"storage_option = '{INLINE}'"]
)
def test_a_settings_file_with_a_mistake_does_not_tell_them(tmp_path: Path, line: str) -> None:
    path = tmp_path / "settings.py"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ConfigError, match="storage_option") as caught:
        parse(TrainConfig, [str(path)], "test")
    assert SECRET not in str(caught.value)


def test_a_flag_without_dashes_does_not_tell_them() -> None:
    with pytest.raises(ConfigError, match=r"did you mean --storage_options=\?") as caught:
        parse(TrainConfig, [f"storage_options={INLINE}"], "test")
    assert SECRET not in str(caught.value)


def test_what_is_written_down_has_a_files_path_and_nothing_that_was_given_inline(options_file: str) -> None:
    assert redacted(TrainConfig())["storage_options"] == ""
    assert redacted(TrainConfig(storage_options=options_file))["storage_options"] == options_file
    for text in (INLINE, SECRET, f'["{SECRET}.json', f'{{"a": "{SECRET}.json'):
        assert redacted(TrainConfig(storage_options=text)) == {
            **redacted(TrainConfig()),
            "storage_options": GIVEN_INLINE,
        }


def test_a_job_carries_them_hidden() -> None:
    config = TrainConfig(out_dir="s3://bucket/run", storage_options=INLINE)
    job = Job.of(config, run_id="", start_id="", cwd="", mailbox=None)
    assert SECRET not in repr(job)
    assert job.full_config == config
    assert str(Secret(SECRET)) == "Secret()"


def test_preflight_and_start_open_out_dir_with_them(tiny: TrainConfig, opened: list[Any]) -> None:
    config = replace(tiny, out_dir="memory://storage-options/run", storage_options='{"skip_instance_cache": true}')
    MemoryFileSystem()
    opened.clear()
    planned = plan(config)
    assert len(opened) == 1, "a client without the options would have been the one that was made before"
    with pytest.raises(CheckpointError, match="holds neither a checkpoint nor"):
        check_start(replace(config, init_from="resume"), CheckpointStore(planned.folder), None)
    assert len(opened) == 1, "it is opened once"


def test_preflight_refuses_what_no_client_takes(tiny: TrainConfig) -> None:
    config = replace(tiny, out_dir="s3://bucket/run", storage_options=json.dumps({"secret": SECRET, "asynchronous": 1}))
    with pytest.raises(CheckpointError, match="out_dir=s3://bucket/run cannot be") as caught:
        plan(config)
    assert SECRET not in str(caught.value)


def test_telemetry_has_them_and_tells_nobody(
    tiny: TrainConfig, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    class Wandb:
        def __init__(self, *args: Any) -> None:
            told["args"] = args

        def close(self) -> None: ...

    monkeypatch.setattr("orchestrator.telemetry.sinks.WandbSink", Wandb)
    options = json.dumps({"skip_instance_cache": True, "secret": SECRET})
    config = replace(tiny, out_dir="memory://storage-options/run", storage_options=options, wandb_log=True)
    folder = open_run_folder(config)
    with open_telemetry(config, World(attempt="a"), folder, lambda _stamped: None):
        pass
    assert {"secret": SECRET} in opened
    given, *_, shown = told["args"]
    assert SECRET not in json.dumps(shown)
    assert given.fs.storage_options["secret"] == SECRET


def test_metrics_make_no_bucket(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Bucket(MemoryFileSystem):  # an object store's paths begin with the bucket, and makedirs would make one
        protocol = "memory"

        def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: ARG002
            pytest.fail("a bucket was made")

    monkeypatch.setattr("orchestrator.storage.location.locate", lambda *_: (Bucket(), "bucket/run"))
    log = MetricsLog(RunFolder("s3://bucket/run"), "a")
    log.write(Stamped(Note(text="a line"), 1000.0))
    with caplog.at_level(logging.WARNING):
        log.close()
    assert not caplog.records


def test_two_ranks_may_make_a_folder_at_once() -> None:
    class Late:
        def __init__(self, is_there: bool) -> None:
            self.is_there = is_there

        def makedirs(self, path: str, exist_ok: bool) -> None:
            raise OSError(f"Failure: {path}, {exist_ok}")

        def isdir(self, _path: str) -> bool:
            return self.is_there

    make_folder(Late(is_there=True), "/run")
    with pytest.raises(OSError, match="Failure"):
        make_folder(Late(is_there=False), "/run")


def test_a_server_that_nobody_listens_for_is_an_error_of_ours() -> None:
    with pytest.raises(CheckpointError, match=r"sftp://me@127\.0\.0\.1:9/run cannot be opened: .*check the address"):
        locate("sftp://me@127.0.0.1:9/run", {"password": SECRET})


def test_the_next_commands_have_them(
    tiny: TrainConfig, options_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints_in(tiny.out_dir).folder.write_json("run.json", {"run_id": "x"})
    monkeypatch.setattr(sys, "argv", ["orchestrator"])
    assert main(["inspect", f"--out_dir={tiny.out_dir}", f"--storage_options={options_file}"]) == 0
    assert f"sample --out_dir={tiny.out_dir} --storage_options={options_file}" in capsys.readouterr().out
    assert main(["inspect", f"--out_dir={tiny.out_dir}", "--storage_options", INLINE]) == 0
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
