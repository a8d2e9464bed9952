"""`ray job submit` from a clone: a head of its own with a job server, as on a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support.head import BIN, ENVIRONMENT, started_head
from tests.support.runs import checkpoints_in

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves

CLONE = Path(__file__).parents[2]
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}  # as in cluster.yaml: a stopped job has so long to save


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """The address of a head's job server."""
    with started_head(STOP_WAIT) as head:
        yield head.dashboard


def submit(job_server: str, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", f"--address={job_server}", f"--submission-id={name}"]
    return subprocess.run(
        [*command, "--working-dir=.", "--", "python", "-m", "orchestrator", "train", *words],
        cwd=CLONE,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_job_trains_and_a_mistake_is_told(tiny: TrainConfig, job_server: str) -> None:
    config = replace(tiny, num_workers=2, max_iters=8)
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    client = JobSubmissionClient(job_server)

    done = submit(job_server, "trains", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert client.get_job_status("trains") == JobStatus.SUCCEEDED
    assert checkpoints_in(config.out_dir).select("latest").iter_num == 8
    lines = client.get_job_logs("trains").splitlines()
    starts = ["iter 0: loss", "step 8: train loss", "saved checkpoint_00000008", "done: 8 iterations"]
    assert [start for start in starts if not any(line.startswith(start) for line in lines)] == [], done.stdout
    assert not [line for line in lines if "\x1b[" in line and "pid=" not in line], "no progress bar in a log"

    wrong = submit(job_server, "wrong", *flags, "--out_dir=out")
    assert wrong.returncode == 1
    assert client.get_job_info("wrong").driver_exit_code == 2, "a user's mistake"
    assert "error: out_dir=out is a folder in this job's copy of the code" in wrong.stdout


@pytest.mark.slow
def test_a_stopped_job_saves_and_the_same_command_goes_on(
    tiny: TrainConfig, job_server: str, undisturbed: Undisturbed
) -> None:
    config = replace(tiny, num_workers=2, max_iters=2000, eval_interval=1000, checkpoint_interval=1000)
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    client = JobSubmissionClient(job_server)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(submit, job_server, "stopped", *flags)
        wait_for_line(client, "stopped", "iter 100:")
        client.stop_job("stopped")
        done = first.result()
    assert client.get_job_status("stopped") == JobStatus.STOPPED
    assert done.returncode == 0, "what Ray's client says of a job that was stopped"
    stopped_at = checkpoints_in(config.out_dir).select("latest").iter_num
    assert 100 < stopped_at < 1000, "saved where it stopped"
    assert f"stopped at iteration {stopped_at} of 2000, saved in" in client.get_job_logs("stopped")

    again = submit(job_server, "again", *flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"iter {stopped_at}:" in again.stdout
    assert f"iter {stopped_at - 1}:" not in again.stdout
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, 2))


def wait_for_line(client: JobSubmissionClient, name: str, start: str) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        with suppress(RuntimeError):  # not there yet
            if any(line.startswith(start) for line in client.get_job_logs(name).splitlines()):
                return
            assert not client.get_job_status(name).is_terminal(), client.get_job_logs(name)
        assert time.monotonic() < deadline_s, f"no {start}"
        time.sleep(0.1)


LARGEST_BYTES = 2**21  # Ray does not compress: our own lines are half of it


def test_what_a_job_takes_along_is_small(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=CLONE, capture_output=True, text=True, check=True).stdout.split()
    clone, package = tmp_path / "clone", tmp_path / "package.zip"
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CLONE / name, clone / name)
    heavy = [
        *(".venv/lib/torch.so", ".git/objects/pack/all.pack", "out/run/checkpoint/model.safetensors", "out-xl/ckpt.pt"),
        *("data/openwebtext/train.bin", "wandb/run.wandb", ".mypy_cache/3.11/cache.json"),
    ]
    for name in heavy:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(os.urandom(LARGEST_BYTES))  # one alone would be too much

    create_package(str(clone), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert {"orchestrator/data/dataset.py", "model/__init__.py", "configs/finetune_gpt2_xl.py"} <= set(names)
    assert [name for name in names if name.startswith(("data/", "out", ".venv", ".git/", "tests/", "wandb"))] == []
    assert package.stat().st_size < LARGEST_BYTES
