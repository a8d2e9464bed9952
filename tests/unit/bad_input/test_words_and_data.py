"""Mistyped words and settings, data that are missing or damaged, files that are no checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import TrainConfig
from orchestrator.driver.preflight import plan
from tests.support.commands import Refused, flags


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


@pytest.mark.parametrize("words", [["inspect"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_error(words: list[str], finished: TrainConfig) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    out_dir = [] if "--help" in words else [f"--out_dir={finished.out_dir}"]
    command = [sys.executable, "-m", "orchestrator", *words, *out_dir]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
