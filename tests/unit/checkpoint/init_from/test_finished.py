"""Runs at max_iters: a finished run says so and exits 0, a new run that could take no step is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import ConfigError, FinishedRunError
from orchestrator.loop import train
from orchestrator.worker import plain
from tests.conftest import final_state
from tests.support.commands import everything_in, flags
from tests.support.sources import beside, names


@pytest.mark.parametrize("kind", ["run", "ckpt.pt"])
def test_a_new_run_past_max_iters_is_refused(first: TrainConfig, tmp_path: Path, kind: str) -> None:
    write_nanogpt(final_state(first.out_dir), tmp_path / "x.pt")
    source = first.out_dir if kind == "run" else str(tmp_path / "x.pt")
    config = beside(first, "again", init_from=source, max_iters=3)
    told = (
        r"is at iteration 4 and max_iters=3: a new run could take no step\. Raise --max_iters, or give --init_weights"
    )
    for start in (plan, lambda config: train(resolve(config), World())):
        with pytest.raises(ConfigError, match=told):
            start(config)
    assert not Path(config.out_dir, names(first)[4]).exists()
    assert plan(replace(config, eval_only=True)).start.iter_num == 4
    assert plan(replace(config, init_weights_only=True)).start.iter_num == 0
    with pytest.raises(ConfigError, match="max_iters=0: a new run could take no step"):
        plan(beside(first, "other", max_iters=0))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("ray.init", lambda *_args, **_options: pytest.fail("a cluster was started"))


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("max_iters", [4, 3])
def test_a_finished_run_says_so_and_exits_0(
    first: TrainConfig, capsys: pytest.CaptureFixture[str], max_iters: int
) -> None:
    before = everything_in(Path(first.out_dir).parent)
    assert main(["train", *flags(replace(first, max_iters=max_iters))]) == 0
    output = capsys.readouterr()
    assert (
        f"out_dir={first.out_dir} is finished: iteration 4 of max_iters={max_iters} ({names(first)[4]})" in output.out
    )
    assert "To go on, raise --max_iters; to begin anew, give another --out_dir\nnext:\n" in output.out
    assert f"sample --out_dir={first.out_dir}" in output.out
    assert everything_in(Path(first.out_dir).parent) == before
    assert output.err == ""


@pytest.mark.usefixtures("no_cluster")
def test_a_finished_run_needs_neither_data_nor_a_writable_folder(
    first: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.driver.preflight.check_writable", lambda *_: pytest.fail("something was written"))
    assert main(["train", *flags(replace(first, data_dir="/nowhere"))]) == 0
    assert "is finished: iteration 4" in capsys.readouterr().out


@pytest.mark.usefixtures("no_cluster")
def test_nanogpts_finished_run_says_so_too(
    first: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "nanogpt").mkdir()
    write_nanogpt(final_state(first.out_dir), tmp_path / "nanogpt" / "ckpt.pt")
    config = replace(first, out_dir=str(tmp_path / "nanogpt"), init_from="resume")
    before = everything_in(tmp_path / "nanogpt")
    assert main(["train", *flags(config)]) == 0
    assert "is finished: iteration 4 of max_iters=4 (ckpt.pt)" in capsys.readouterr().out
    assert everything_in(tmp_path / "nanogpt") == before
    assert plan(replace(config, max_iters=5)).start.iter_num == 4


@pytest.mark.parametrize("kind", ["run", "nanogpt"])
def test_the_plain_loop_says_so(
    first: TrainConfig, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = first
    if kind == "nanogpt":
        (tmp_path / "nanogpt").mkdir()
        write_nanogpt(final_state(first.out_dir), tmp_path / "nanogpt" / "ckpt.pt")
        config = replace(first, out_dir=str(tmp_path / "nanogpt"), init_from="resume")
    before = everything_in(Path(config.out_dir))
    assert plain.main(flags(config)) == 0
    assert capsys.readouterr().out.count("is finished: iteration 4 of max_iters=4") == 1
    assert everything_in(Path(config.out_dir)) == before


@pytest.mark.slow
def test_the_plain_loop_says_so_once_under_torchrun(first: TrainConfig) -> None:
    before = everything_in(Path(first.out_dir))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "orchestrator.loop", *flags(first)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished: iteration 4 of max_iters=4") == 1
    assert everything_in(Path(first.out_dir)) == before


def test_settings_of_another_model_come_before(first: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="holds another model"):
        plan(replace(first, n_layer=3))
    with pytest.raises(FinishedRunError, match="is finished"):
        plan(first)
