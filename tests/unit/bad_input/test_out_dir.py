"""An out_dir that holds another model or nothing, and checkpoints that are damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.__main__ import main
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from orchestrator.loop import train
from orchestrator.training.attempt import Callbacks
from tests.support.commands import Refused, everything_in, flags
from tests.support.runs import checkpoints_in


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
    train(resolve(config), World(attempt="again"), Callbacks(lambda record: began.append(record.iter)))
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
