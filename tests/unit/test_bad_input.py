"""A user's mistakes on the command line: exit code 2, an error that names cause and remedy, nothing changed."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.__main__ import main
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError
from orchestrator.loop import train
from orchestrator.telemetry.records import to_json
from orchestrator.training.attempt import Callbacks
from tests.support.runs import checkpoints_in

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("orchestrator")
    handlers, level = root.handlers[:], ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Return a function that gives words to the command line and returns what it says about them."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("ray.init", lambda *_args, **_options: pytest.fail("a cluster was started"))

    def call(*words: str) -> str:
        before = everything_in(tmp_path)
        assert main(words) == 2
        assert everything_in(tmp_path) == before, "a refused command changed something"
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err
        return " ".join(output.err.split())

    return call


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def flags(config: TrainConfig, **changes: Any) -> list[str]:
    return [f"--{key}={value}" for key, value in asdict(replace(config, **changes)).items()]


@pytest.fixture
def finished(tiny: TrainConfig) -> TrainConfig:
    """A run of four iterations with checkpoints at two and four, ended."""
    config = replace(
        tiny, max_iters=4, checkpoint_interval=2, eval_interval=4, num_workers=1, gradient_accumulation_steps=1
    )
    for max_iters in (2, 4):  # the last state is always saved, others only if the one before has been
        train(resolve(replace(config, max_iters=max_iters)), World())
    return config


@pytest.fixture
def own_data(data_dir: str, tmp_path: Path) -> Path:
    """A copy of the dataset `tiny` that a test may damage."""
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    for path in Path(data_dir, "tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# the command line itself


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: trian: no such command; did you mean train?"),
        (["train", "--max_itres=5"], "Unrecognized options: --max_itres=5"),
        (["train", "--max_itres=5"], "--max_iters INT"),
        (["train", "--max_iters=many"], "Error parsing --max_iters: invalid literal for int() with base 10: 'many'"),
        (["train", "--max_iters"], "Missing value for argument '--max_iters'"),
        (["train", "--bias=flase"], "invalid choice 'flase' for argument '--bias'"),
        (["train", "--dtype=float8"], "invalid choice 'float8' for argument '--dtype'"),
        (["train", "--max_iters=-1"], "error: max_iters=-1 is out of range: 0 or more"),
        (["train", "--dropout=1.5"], "error: dropout=1.5 is out of range: from 0 up to, not including, 1"),
        (["train", "--n_embd=33", "--n_head=2"], "error: n_embd=33 is not divisible by n_head=2"),
        (["train", "--num_workers=8", "--gradient_accumulation_steps=4"], "error: num_workers=8 is more than"),
        (["train", "no_such_file.py"], "error: settings file no_such_file.py does not exist"),
        (["train", "--init_from=gtp2"], "did you mean gpt2?"),
        (["train", "--init_from=no_such.pt"], "error: init_from='no_such.pt' is neither scratch, resume, gpt2,"),
        (["prepare"], "Missing from orchestrator prepare"),
        (["prepare", "mine"], "error: dataset 'mine' needs a text: --text"),
        (["prepare", "mine", "--text", "no_such.txt"], "error: cannot read the text no_such.txt"),
        (["sample", "--init_from=gtp2"], "did you mean gpt2?"),
        (["sample", "--temperature=-1"], "error: temperature=-1.0 is out of range: 0 or more"),
        (["export", "--to=x.pt", "--format=huggingface"], "error: format='huggingface' is none of nanogpt, hf"),
        (["export", "--format=hf"], "error: --to is missing: the folder to write"),
    ],
)
def test_wrong_words(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*words)


def test_settings_file_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "settings.py"
    path.write_text("batch_size = 4\nmax_itres = 3\n")
    assert refused("train", str(path)) == (
        f"error: {path}, line 2: max_itres=3: no such setting; did you mean max_iters? "
        "(a variable of your own starts with _)"
    )
    path.write_text("batch_size = 4\nmax_iters = (3\n")
    assert refused("train", str(path)) == f"error: {path}, line 2: '(' was never closed"


# data


def test_unknown_dataset(refused: Refused, tiny: TrainConfig) -> None:
    said = refused("train", *flags(tiny, dataset="tinny"))
    assert f"error: no dataset folder {tiny.data_dir}/tinny (there are: tiny); run: " in said
    assert "orchestrator prepare tinny" in said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "train.bin is missing; run: "),
        (lambda path: path.write_bytes(b""), "train.bin is empty; run: "),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "train.bin is truncated: 179,999 bytes are no whole"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "train.bin has 89,999 tokens, but meta.json says"),
    ],
    ids=["missing", "empty", "truncated", "shorter"],
)
def test_damaged_data(
    refused: Refused, tiny: TrainConfig, own_data: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(own_data / "train.bin")
    assert message in refused("train", *flags(tiny, data_dir=str(own_data.parent)))


def test_tokens_outside_the_vocabulary(refused: Refused, tiny: TrainConfig, own_data: Path) -> None:
    tokens = np.fromfile(own_data / "val.bin", dtype=np.uint16)
    tokens[1234] = 5000
    tokens.tofile(own_data / "val.bin")
    said = refused("train", *flags(tiny, data_dir=str(own_data.parent)))
    assert "val.bin: token 5000 at position 1,234 is outside the model's vocabulary (vocab_size=" in said


def test_block_size_over_the_text(refused: Refused, tiny: TrainConfig) -> None:
    said = refused("train", *flags(tiny, block_size=20000))
    assert "val.bin has 10,000 tokens, but block_size=20000 needs at least 20,001" in said


def test_missing_data_are_left_to_the_nodes_of_a_cluster(tiny: TrainConfig) -> None:
    planned = plan(replace(tiny, dataset="elsewhere"))
    assert "no dataset folder" in str(planned.no_data)


# init_from


def test_nothing_to_resume(refused: Refused, tiny: TrainConfig) -> None:
    said = refused("train", *flags(tiny, init_from="resume"))
    assert f"init_from=resume, but out_dir={tiny.out_dir} holds neither a checkpoint nor nanoGPT's ckpt.pt" in said


def test_block_size_over_the_models(refused: Refused, tiny: TrainConfig) -> None:
    said = refused("train", *flags(tiny, init_from="gpt2", block_size=2048))
    assert "block_size=2048 is over the model's: gpt2 has 1024 positions. Give --block_size=1024 or less" in said


def test_file_that_is_no_checkpoint(refused: Refused, tiny: TrainConfig, tmp_path: Path) -> None:
    text, archive, other = tmp_path / "text.pt", tmp_path / "zip.pt", tmp_path / "other.pt"
    text.write_text("no checkpoint")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello", "world")
    torch.save({"hello": 1}, other)
    for path in (text, archive, other):
        assert str(path) in refused("train", *flags(tiny, init_from=str(path)))
        assert str(path) in refused("sample", f"--init_from={path}", "--device=cpu")


# storage


@pytest.mark.parametrize("out_dir", ["/proc/run", "/proc/1/run/deeper", "{tmp_path}/text/run", "{tmp_path}/text"])
def test_storage_that_cannot_be_written(refused: Refused, tiny: TrainConfig, tmp_path: Path, out_dir: str) -> None:
    if sys.platform != "linux" and out_dir.startswith("/proc"):
        pytest.skip("/proc is Linux's")
    (tmp_path / "text").write_text("a file, no folder")
    out_dir = out_dir.format(tmp_path=tmp_path)
    said = refused("train", *flags(tiny, out_dir=out_dir))
    assert said.startswith(f"error: out_dir={out_dir} cannot be written: ")
    assert said.endswith("check the path, permissions and free space")


@pytest.fixture
def _s3() -> None:
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # it would keep the address of another test


@pytest.mark.usefixtures("_s3")
def test_unreachable_storage(refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused, and nobody else takes the port
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name-of-the-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        said = refused("train", *flags(tiny, out_dir="s3://bucket/run"))
    assert "error: out_dir=s3://bucket/run cannot be read: the server cannot be reached (EndpointConnection" in said
    assert said.endswith("check the address, the network and the credentials")
    assert "name-of-the-key" not in said
    assert "the-secret" not in said


@pytest.mark.usefixtures("_s3")
def test_silent_storage(refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.run_folder._FIRST_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        said = refused("train", *flags(tiny, out_dir="s3://silent/run"))
    assert "error: out_dir=s3://silent/run cannot be read: no answer in 0.5 s; check the address" in said


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("xyz://bucket/run", "xyz://bucket/run: no such protocol; give a path, or a URL such as s3://bucket/run"),
        ("s33://bucket/run", "s33://bucket/run: no such protocol; give a path, or a URL such as s3://bucket/run; did"),
        ("gs://bucket/run", "the package for gs:// is not installed: pip install 'nanogpt-orchestrator[gcs]'"),
        ("abfs://bucket/run", "the package for abfs:// is not installed: pip install 'nanogpt-orchestrator[azure]'"),
    ],
)
def test_unknown_protocol(
    refused: Refused, finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where they are not installed
    monkeypatch.setitem(sys.modules, "adlfs", None)
    assert message in refused("train", *flags(finished, out_dir=url))
    assert message in refused("inspect", f"--out_dir={url}")
    assert message in refused("export", f"--out_dir={finished.out_dir}", f"--to={url}")


def test_a_whole_bucket_is_no_run(refused: Refused, tiny: TrainConfig) -> None:
    pytest.importorskip("s3fs")
    said = refused("train", *flags(tiny, out_dir="s3://bucket"))
    assert said == "error: out_dir=s3://bucket is a whole bucket: give a folder in it, s3://bucket/run"


@pytest.mark.parametrize("key", ["out_dir", "init_from"])
def test_a_password_in_a_url_is_refused_and_not_repeated(refused: Refused, tiny: TrainConfig, key: str) -> None:
    said = refused("train", *flags(tiny, **{key: "sftp://me:hush@host/run"}))
    assert said.startswith(f"error: {key} holds a password")
    assert "hush" not in said


@pytest.mark.parametrize(("key", "package"), [("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")])
def test_a_missing_extra_is_named(
    refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    said = refused("train", *flags(tiny, **{key: True}))
    assert said == f"error: {key}=True needs a package: pip install 'nanogpt-orchestrator[{package}]'"


def test_check_of_storage_leaves_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    before = everything_in(tmp_path)
    assert plan(replace(tiny, out_dir=str(tmp_path / "new" / "deeper" / "run"))).start.iter_num == 0
    assert everything_in(tmp_path) == before


# what out_dir holds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, "holds another model (n_layer=2, asked for 3): give the settings it was begun with,"),
        ({"n_embd": 64, "bias": True}, "holds another model (n_embd=32, asked for 64; bias=False, asked for True):"),
        ({"block_size": 8}, "holds a model with block_size=16, asked for 8"),
        ({"init_from": "gpt2"}, "holds a run that was begun with init_from=scratch, asked for init_from=gpt2"),
    ],
)
def test_out_dir_of_another_model(
    refused: Refused, finished: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    assert message in refused("train", *flags(finished, max_iters=8, **changes))


def test_dataset_of_another_vocabulary(refused: Refused, finished: TrainConfig, own_data: Path) -> None:
    meta = json.loads((own_data / "meta.json").read_text())
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"] + "\u2603"
    meta["vocab_size"] += 1
    (own_data / "meta.json").write_text(json.dumps(meta))
    said = refused("train", *flags(finished, max_iters=8, data_dir=str(own_data.parent)))
    assert f"holds another model (vocab_size={meta['vocab_size'] - 1}, asked for {meta['vocab_size']})" in said


def test_empty_folder(refused: Refused, tmp_path: Path) -> None:
    out_dir = tmp_path / "empty"
    out_dir.mkdir()
    assert f"out_dir={out_dir} holds no checkpoint" in refused("export", f"--out_dir={out_dir}", "--to=x.pt")
    assert f"out_dir={out_dir} holds no checkpoint" in refused("sample", f"--out_dir={out_dir}", "--device=cpu")
    assert f"out_dir={out_dir} holds no run" in refused("inspect", f"--out_dir={out_dir}")


@pytest.mark.parametrize("command", [["sample", "--device=cpu"], ["export", "--to=x.pt"], ["inspect"]])
def test_a_file_instead_of_a_folder(refused: Refused, tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "ckpt.pt"
    file.touch()
    assert f"a file of weights is given as --init_from={file}" in refused(*command, f"--out_dir={file}")


def test_checkpoint_that_is_not_there(refused: Refused, finished: TrainConfig) -> None:
    newest = checkpoints_in(finished.out_dir).select("latest").name
    said = refused("export", f"--out_dir={finished.out_dir}", "--to=x.pt", "--checkpoint=checkpoint_00000004")
    assert "holds no whole checkpoint checkpoint_00000004; there are: checkpoint_00000004_" in said
    assert f"did you mean {newest}?" in said


def test_export_onto_what_is_there(refused: Refused, finished: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_text("precious")
    said = refused("export", f"--out_dir={finished.out_dir}", f"--to={tmp_path}/ckpt.pt")
    assert said == f"error: {tmp_path}/ckpt.pt exists: give another --to, or --overwrite=True"


# damaged checkpoints


def damage(out_dir: str, iter_num: int, pattern: str = "model-*") -> str:
    """Flip a bit in the middle of a checkpoint's file and return the checkpoint's name."""
    (path,) = Path(out_dir).glob(f"checkpoint_{iter_num:08d}_*/{pattern}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.parent.name


def resumed(config: TrainConfig) -> int:
    """Train two more iterations and return where that began."""
    began: list[int] = []
    train(resolve(config), World(attempt="again"), Callbacks(lambda record: began.append(to_json(record)["iter"])))
    return began[0]


@pytest.mark.parametrize("pattern", ["model-*", "optimizer-*", "state.json"])
def test_training_falls_back_one_checkpoint(
    finished: TrainConfig, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    name = damage(finished.out_dir, 4, pattern)
    assert resumed(replace(finished, max_iters=6)) == 2
    assert f"checkpoint {name} is not whole, falling back to the one before: " in caplog.text
    assert "its checksum differs" in caplog.text or "is damaged" in caplog.text


def test_damaged_checkpoints_do_not_count_among_those_kept(finished: TrainConfig) -> None:
    damage(finished.out_dir, 4)
    resumed(replace(finished, max_iters=3, keep_checkpoints=1))
    store = checkpoints_in(finished.out_dir)
    assert [checkpoint.iter_num for checkpoint in store.newest_first()] == [4, 3], "3 is whole, and must not be deleted"
    assert resumed(replace(finished, max_iters=6)) == 3


def test_export_falls_back_one_checkpoint(
    finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    name = damage(finished.out_dir, 4)
    assert main(["export", f"--out_dir={finished.out_dir}", f"--to={tmp_path}/ckpt.pt"]) == 0
    assert f"checkpoint {name} is not whole, falling back" in caplog.text
    assert "(iteration 2)" in capsys.readouterr().out


def test_sample_falls_back_one_checkpoint(finished: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    damage(finished.out_dir, 4)
    assert main(["sample", f"--out_dir={finished.out_dir}", "--num_samples=1", "--max_new_tokens=3"]) == 0
    assert "(iteration 2)" in caplog.text


def test_inspect_names_the_damaged_file(finished: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    name = damage(finished.out_dir, 4)
    assert main(["inspect", f"--out_dir={finished.out_dir}", "--verify=True"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(name) and "DAMAGED" in line and "model-00000-of-00001" in line for line in lines)


@pytest.mark.parametrize("words", [["inspect"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_error(words: list[str], finished: TrainConfig) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    out_dir = [] if "--help" in words else [f"--out_dir={finished.out_dir}"]
    command = [sys.executable, "-m", "orchestrator", *words, *out_dir]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_damaged_checkpoint_by_name(refused: Refused, finished: TrainConfig) -> None:
    name = damage(finished.out_dir, 4)
    said = refused("export", f"--out_dir={finished.out_dir}", "--to=x.pt", f"--checkpoint={name}")
    assert "model-00000-of-00001.safetensors is damaged: its checksum differs" in said


def test_run_without_a_whole_checkpoint_is_not_begun_anew(refused: Refused, finished: TrainConfig) -> None:
    for iter_num in (2, 4):
        damage(finished.out_dir, iter_num, "state.json")
    said = refused("train", *flags(finished, max_iters=8))
    assert f"error: out_dir={finished.out_dir} holds a run, but no whole checkpoint of it: checkpoint_00000004_" in said
    assert said.endswith("Restore one from a copy, or give another --out_dir to begin anew")


def test_run_without_whole_tensors_is_not_begun_anew(finished: TrainConfig) -> None:

    for iter_num in (2, 4):
        damage(finished.out_dir, iter_num)
    before = everything_in(Path(finished.out_dir))
    with pytest.raises(CheckpointError, match="no whole checkpoint of it"):
        train(resolve(replace(finished, max_iters=8)), World())
    assert everything_in(Path(finished.out_dir)) == before
