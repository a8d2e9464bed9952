"""Signals to a local run, as a terminal, `timeout`, systemd or Slurm send them: it saves, and no process stays."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support.ray_runs import OWN_CLUSTER
from tests.support.runs import checkpoints_in, metrics_in

_LEAVES_S = 20.0  # seconds on an idle machine: two workers save, Ray ends


@dataclass
class Run:
    """`orchestrator train` in a process group of its own, as a shell starts it."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, text: str) -> None:
        deadline_s = time.monotonic() + 90
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.log.read_text()  # noqa: PT018
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def send_to_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def send_to_all(self, number: int) -> None:
        """As to a control group: to those that have left the process group as well."""
        for process in [*self.processes(), psutil.Process(self.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def ends(self, started: list[psutil.Process], code: int = 130) -> str:
        """Check that it ends soon, with this exit code, and that no process is left; return what it said."""
        assert self.process.wait(timeout=_LEAVES_S) == code, self.log.read_text()
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []
        said = self.log.read_text()
        assert "Traceback" not in said, said
        return said


Start = Callable[[TrainConfig], Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start_one(config: TrainConfig) -> Run:
        log = tmp_path / f"log{len(runs)}"
        flags = [f"--{key}={value}" for key, value in asdict(config).items()]
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "train", *flags],
                env=OWN_CLUSTER,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        runs.append(Run(process, log))
        return runs[-1]

    yield start_one
    for run in runs:
        run.process.kill()
        run.process.wait()


def endless(config: TrainConfig) -> TrainConfig:
    return replace(config, num_workers=2, max_iters=10**6, checkpoint_interval=10**6, eval_interval=10**6)


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGTERM, "all"),
        pytest.param(signal.SIGTERM, "group", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "group", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "group", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "driver", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves_no_process_behind(
    tiny: TrainConfig, start: Start, number: signal.Signals, whom: str
) -> None:
    run = start(endless(tiny))
    run.wait_for("iter 20:")
    started = run.processes()
    assert len(started) > 3, "raylet, gcs_server and workers are children of the driver"
    {"all": run.send_to_all, "group": run.send_to_group, "driver": run.process.send_signal}[whom](number)
    said = run.ends(started)
    stopped_at = checkpoints_in(tiny.out_dir).select("latest").iter_num
    assert f"stopped at iteration {stopped_at} of" in said
    assert stopped_at == max(record["iter"] for record in metrics_in(tiny.out_dir) if record["kind"] == "step") + 1
    assert not (Path(tiny.out_dir) / "driver.json").exists()


@pytest.mark.slow
def test_a_signal_breaks_a_long_evaluation_off(tiny: TrainConfig, start: Start, undisturbed: Undisturbed) -> None:
    run = start(replace(tiny, num_workers=2, eval_iters=10**6, eval_interval=16, init_from="scratch"))
    deadline_s = time.monotonic() + 60
    while not metrics_in(tiny.out_dir) and time.monotonic() < deadline_s:  # the first evaluation has begun
        time.sleep(0.1)
    time.sleep(1)
    started = run.processes()
    run.send_to_group(signal.SIGTERM)
    assert "stopped before the first iteration" in run.ends(started)
    again = start(replace(tiny, num_workers=2))
    assert again.process.wait(180) == 0, again.log.read_text()
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 2))


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tiny: TrainConfig, start: Start) -> None:
    run = start(endless(tiny))
    run.wait_for("iter 20:")
    started = run.processes()
    workers = [process for process in started if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)  # they would save and leave
    run.send_to_group(signal.SIGINT)
    run.wait_for("stopping: ")
    run.send_to_group(signal.SIGINT)
    run.ends(started)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [3.0, 5.0, 7.0, 10.0])
def test_a_signal_while_it_starts(tiny: TrainConfig, start: Start, after_s: float) -> None:
    run = start(endless(tiny))
    time.sleep(after_s)
    started = run.processes()
    run.send_to_group(signal.SIGTERM)
    code = run.process.wait(timeout=2 * _LEAVES_S)
    said = run.log.read_text()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert code in (130, -signal.SIGTERM), said  # the latter before anything of ours runs
    assert "Traceback" not in said, said


@pytest.mark.slow
def test_a_closed_terminal_stops_the_run(tiny: TrainConfig) -> None:
    config = endless(tiny)
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, [sys.executable, "-m", "orchestrator", "train", *flags], OWN_CLUSTER)
    said = b""
    while b"iter 20:" not in said:
        said += os.read(terminal, 65536)
    started = psutil.Process(pid).children(recursive=True)
    os.close(terminal)
    deadline_s = time.monotonic() + _LEAVES_S
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended[0] == pid
    assert os.waitstatus_to_exitcode(ended[1]) == 130
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    stopped_at = checkpoints_in(tiny.out_dir).select("latest").iter_num
    assert stopped_at == max(record["iter"] for record in metrics_in(tiny.out_dir) if record["kind"] == "step") + 1


@pytest.mark.slow
def test_a_reader_that_ctrl_c_ends_first_costs_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    config = endless(tiny)
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    read, write = os.pipe()
    tee = subprocess.Popen(["tee", str(tmp_path / "log")], stdin=read, stdout=subprocess.DEVNULL)
    driver = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "train", *flags], env=OWN_CLUSTER, stdout=write, stderr=write
    )
    os.close(read), os.close(write)
    run = Run(driver, tmp_path / "log")
    try:
        run.log.touch()
        run.wait_for("iter 20:")
        started = run.processes()
        tee.send_signal(signal.SIGINT)
        tee.wait()
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=_LEAVES_S) == 130
    finally:
        tee.kill()
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    stopped_at = checkpoints_in(tiny.out_dir).select("latest").iter_num
    assert stopped_at == max(record["iter"] for record in metrics_in(tiny.out_dir) if record["kind"] == "step") + 1
