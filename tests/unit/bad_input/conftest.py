"""A user's mistakes on the command line: exit code 2, an error that names cause and remedy, nothing changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train
from tests.support.commands import Refused, everything_in


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
