"""Paths as users write them, in every command: the home folder, URLs of files, and what cannot be meant."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.__main__ import main
from orchestrator.commands.export import ExportConfig
from orchestrator.commands.inspect_run import InspectConfig
from orchestrator.commands.report import ReportConfig
from orchestrator.commands.sample import SampleConfig
from orchestrator.config import TrainConfig, parse
from orchestrator.data.prepare import PrepareConfig
from orchestrator.errors import ConfigError
from orchestrator.storage.options import read_again, storage_options_of
from orchestrator.storage.paths import with_paths

KINDS: list[type[Any]] = [TrainConfig, SampleConfig, ExportConfig, InspectConfig, ReportConfig]
KEYS = {
    "out_dir": "runs/a",
    "data_dir": "data",
    "init_from": "ckpt.pt",
    "memory_dir": "memory",
    "storage_options": "options.json",
    "to": "ckpt.pt",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def keys_of(kind: type[Any]) -> dict[str, str]:
    return {key: path for key, path in KEYS.items() if key in kind.__dataclass_fields__}


@pytest.mark.parametrize("kind", KINDS)
def test_the_home_folder_is_known_in_flags_and_settings_files(kind: type[Any], home: Path) -> None:
    keys = keys_of(kind)
    (home / "settings.py").write_text("".join(f"{key} = '~/{path}'\n" for key, path in keys.items()))
    for argv in ([f"--{key}=~/{path}" for key, path in keys.items()], ["~/settings.py"]):
        config = parse(kind, argv, "test")
        assert {key: getattr(config, key) for key in keys} == {key: f"{home}/{path}" for key, path in keys.items()}


def test_prepare_and_a_prompt_know_it_too(home: Path) -> None:
    config = with_paths(PrepareConfig("x", text=("~/a.txt", "b*.txt", f"~{getpass.getuser()}"), data_dir="~/d"))
    assert config.text == (f"{home}/a.txt", "b*.txt", os.path.expanduser(f"~{getpass.getuser()}"))  # noqa: PTH111
    assert config.data_dir == f"{home}/d"
    assert parse(SampleConfig, ["--start=FILE:~/prompt.txt"], "test").start == f"FILE:{home}/prompt.txt"
    assert parse(SampleConfig, ["--start=~ $HOME"], "test").start == "~ $HOME", "a prompt is no path"


def test_prepare_makes_no_folder_named_after_the_sign(home: Path) -> None:
    (home / "book.txt").write_text("some words\n" * 100)
    flags = ["--text", "~/book.txt", "--tokenizer=char", "--data_dir=~/d"]
    assert main(["prepare", "mine", *flags]) == 0
    assert (home / "d" / "mine" / "train.bin").is_file()
    assert not (home.parent / "~").exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/run", "/a/run"),
        ("file:/a/run", "/a/run"),
        ("file://localhost/a/run", "/a/run"),
        ("FILE:///a/run", "/a/run"),
        ("local:///a/run", "/a/run"),
        ("S3://Bucket/Run", "s3://Bucket/Run"),
        ("s3://bucket/a~b/~/lr=[1e-3] #1?x=%20+{a,b}", "s3://bucket/a~b/~/lr=[1e-3] #1?x=%20+{a,b}"),
        ("out/lr=[1e-3]/*", "out/lr=[1e-3]/*"),
        ("s3://bucket/cost$5/_$folder$", "s3://bucket/cost$5/_$folder$"),
    ],
)
def test_urls_of_files_are_paths_and_others_stay(url: str, path: str) -> None:
    assert parse(TrainConfig, [f"--out_dir={url}"], "test").out_dir == path


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--out_dir=$SCRATCH/run", "holds $SCRATCH, which nobody has replaced"),
        ("--data_dir=/data/${USER}", "holds ${USER}, which nobody has replaced"),
        ("--out_dir=s3://$BUCKET/run", "holds $BUCKET, which"),
        ("--out_dir=out/run ", "begins or ends with a blank"),
        ("--out_dir= out/run", "begins or ends with a blank"),
        ("--data_dir=data\n", "a line end or another control character"),
        ("--out_dir=a\0b", "a line end or another control character"),
        ("--data_dir=", "data_dir is empty: give a folder"),
        ("--out_dir=", "out_dir is empty: give a folder"),
        ("--data_dir=s3://bucket/data", "is a URL: give a folder on a disk"),
        ("--memory_dir=s3://bucket/data", "is a URL: give a folder on a disk"),
        ("--out_dir=s3:/bucket/run", "lacks a slash: s3://bucket/run"),
        ("--out_dir=~nobody-of-this-name/run", "no user has the name nobody-of-this-name"),
        ("--init_from=sftp://me:secret@host/ckpt.pt", "init_from holds a password"),
    ],
)
def test_what_cannot_be_meant_is_refused(flag: str, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(TrainConfig, [flag], "test")
    assert why in str(refused.value)
    assert flag.partition("=")[0][2:] in str(refused.value)
    assert "secret" not in str(refused.value)


def test_what_lies_under_an_odd_name_is_meant(home: Path) -> None:
    odd = home.parent / "$RUN "
    odd.mkdir()
    assert parse(TrainConfig, [f"--out_dir={odd}"], "test").out_dir == str(odd)


def test_nobody_without_a_home_is_sent_to_one() -> None:
    code = """import pwd, sys; pwd.getpwuid = lambda _: (_ for _ in ()).throw(KeyError()); sys.argv[0] = "orchestrator"
from orchestrator.__main__ import main; sys.exit(main(["inspect", "--out_dir=~/run"]))"""
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: out_dir='~/run': HOME is not set, and this user has no home folder" in done.stderr


def test_options_may_name_a_file_at_home_and_are_read_again(home: Path) -> None:
    (home / "key").write_text("a key")
    file = home / "options.json"
    file.write_text(json.dumps({"key_filename": "~/key", "password": "~/not a file"}))
    options = storage_options_of(TrainConfig(storage_options=str(file)))
    assert options == {"key_filename": f"{home}/key", "password": "~/not a file"}
    file.write_text('{"token": "new"}')
    assert read_again(options) == {"token": "new"}
    file.write_text('{"token": "half')
    assert read_again({"token": "new"}) == {"token": "new"}
    assert read_again({"token": "inline"}) == {"token": "inline"}
