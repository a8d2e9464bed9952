"""`make train` hands names over as they are, spaces and quotes too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands_of(folder: Path, *words: str) -> list[list[str]]:
    """Return the commands that `make train` runs, as a program in the place of `orchestrator` receives them."""
    program, log = folder / "orchestrator", folder / "log"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open({str(log)!r}, 'a'))\n"
    )
    program.chmod(0o755)
    make = ["make", "--no-print-directory", "--assume-old=.venv/ready", "train", f"BIN={folder}", *words]
    subprocess.run(make, cwd=ROOT, check=True, timeout=60)
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("name", ["book", "my book", 'it\'s "mine"', "lr=[1e-3] & more"])
def test_make_train_takes_a_text_of_any_name(tmp_path: Path, name: str) -> None:
    text = f"texts of mine/{name}.txt"
    prepare, train, sample, inspect = commands_of(tmp_path, f"TEXT={text}")
    assert prepare == ["prepare", name, f"--text={text}", "--tokenizer=char"]
    assert f"--dataset={name}" in train
    assert f"--out_dir=out/{name}" in train
    assert f"--out_dir=out/{name}" in sample
    assert f"--out_dir=out/{name}" in inspect


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_train_without_a_text_takes_the_quickstart(tmp_path: Path) -> None:
    prepare, train, *_ = commands_of(tmp_path)
    assert prepare == ["prepare", "quickstart"]
    assert train[1:] == ["configs/quickstart.py", "--dataset=quickstart", "--out_dir=out/quickstart"]
