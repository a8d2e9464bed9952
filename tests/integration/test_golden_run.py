"""A run that an earlier version of this program saved goes on, samples and exports: users' runs outlive our changes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from orchestrator.checkpoint.formats.nanogpt import read_nanogpt
from orchestrator.commands.export import ExportConfig, export
from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.commands.sample import SampleConfig, sample
from orchestrator.config import TrainConfig, parse
from tests.conftest import final_state
from tests.support import ranks

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "run.json").read_text()) if (GOLDEN / "run.json").is_file() else {}
pytestmark = pytest.mark.skipif(not FACTS, reason=f"the recorded run is not at {GOLDEN}")


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A copy of the run, which its user may have moved."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "run").chmod(0o755)
    return str(tmp_path / "run")


def settings(run: str, memory_dir: str) -> TrainConfig:
    """Return the settings of the command that is recorded in run.json, for this place."""
    words = [word for word in FACTS["command"].split() if word.startswith("--")]
    here = {"out_dir": run, "data_dir": str(GOLDEN / "run_data"), "memory_dir": memory_dir}
    return replace(parse(TrainConfig, words, "train"), **here)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the hash that run.json describes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def losses(run: str) -> dict[int, float]:
    records = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return {record["iter"]: record["val_loss"] for record in records if record["kind"] == "eval"}


def test_its_weights_are_read_with_the_same_bits(run: str) -> None:
    state = final_state(run)
    assert state.iter_num == FACTS["iter_num"]
    assert digest(state.model) == FACTS["weights_sha256"]
    assert "checkpoint_00000040_ce5eef9d" in inspect(InspectConfig(run, verify=True))


def test_it_goes_on_as_it_would_have(run: str, memory_dir: str, tmp_path: Path) -> None:
    ended = ranks.train(replace(settings(run, memory_dir), max_iters=80), 2, tmp_path / "log")
    assert ended.is_done, ended.said
    assert "resuming checkpoint_00000040_ce5eef9d" in ended.said
    recorded = {int(it): loss for it, loss in FACTS["val_loss_when_continued_to_80_on_two_workers"].items()}
    tolerance = FACTS["tolerance_on_another_processor"]
    assert losses(run) == pytest.approx(recorded, abs=tolerance)
    assert final_state(run).iter_num == 80
    assert "gradients summed in 2 lanes" in inspect(InspectConfig(run))  # it was saved by two workers


def test_it_samples_and_exports(run: str, tmp_path: Path) -> None:
    said = io.StringIO()
    sample(SampleConfig(out_dir=run, num_samples=1, max_new_tokens=20, temperature=0.0, device="cpu"), said)
    assert len(said.getvalue()) > 20
    export(ExportConfig(out_dir=run, format="nanogpt", to=str(tmp_path / "ckpt.pt")))
    exported = read_nanogpt(tmp_path / "ckpt.pt")
    assert digest(exported.model) == FACTS["weights_sha256"]
    assert exported.optimizer.keys() == final_state(run).optimizer.keys()
    export(ExportConfig(out_dir=run, format="hf", to=str(tmp_path / "hf")))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(theirs.transformer.wte.weight, exported.model["transformer.wte.weight"])


@pytest.mark.slow
def test_its_command_goes_on_with_it_on_ray(run: str, memory_dir: str) -> None:
    config = replace(settings(run, memory_dir), max_iters=60)
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "train", *flags],
        env={**os.environ, "RAY_ADDRESS": "local"},
        timeout=240,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "continuing checkpoint_00000040_ce5eef9d" in done.stderr
    assert final_state(run).iter_num == 60
    assert losses(run)[60] == pytest.approx(FACTS["val_loss_when_continued_to_80_on_two_workers"]["60"], abs=1e-3)
