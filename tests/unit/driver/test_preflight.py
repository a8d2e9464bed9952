"""Within a job, relative paths would mean Ray's temporary copy of the code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from orchestrator.driver.preflight import plan
from orchestrator.errors import ConfigError


@pytest.fixture
def job_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a job that was submitted with --working-dir."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_relative_out_dir_in_a_job_is_refused(tiny: TrainConfig, job_files: Path) -> None:
    with pytest.raises(ConfigError, match=r"out_dir=out is a folder in this job's copy .* all nodes share, or a URL"):
        plan(replace(tiny, out_dir="out"))
    assert list(job_files.iterdir()) == []


@pytest.mark.usefixtures("job_files")
def test_relative_data_dir_without_data_in_a_job_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"data_dir=data is a folder in this job's copy"):
        plan(replace(tiny, data_dir="data"))


@pytest.mark.usefixtures("job_files")
def test_absolute_paths_in_a_job_are_taken(tiny: TrainConfig) -> None:
    assert plan(tiny).config.out_dir == tiny.out_dir
