"""Kill workers and drivers at chosen and random points: the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import RunFailedError, launch
from orchestrator.driver.registry import REGISTRY_FILE
from orchestrator.host.machine import usable_cpus
from tests.conftest import Undisturbed, final_state
from tests.support.faults import Fault, worker_with
from tests.support.ray_runs import OWN_CLUSTER, attempts, causes, steps_repeated

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("world_size", "point", "rank", "iter_num"),
    [
        pytest.param(2, "forward", 1, 10, marks=pytest.mark.slow),
        pytest.param(3, "optimizer", 0, 13, marks=pytest.mark.slow),
        pytest.param(3, "all_reduce", 2, 11, marks=pytest.mark.slow),
        pytest.param(3, "copy", 1, 12, marks=pytest.mark.slow),
        pytest.param(3, "during", 1, 12, marks=pytest.mark.slow),
        pytest.param(3, "write", 2, 16, marks=pytest.mark.slow),
        pytest.param(2, "commit", 0, 12, marks=pytest.mark.slow),
        pytest.param(3, "evaluate", 1, 16, marks=pytest.mark.slow),
        pytest.param(3, "forward", random.Random().randrange(3), random.Random().randrange(24), marks=pytest.mark.slow),
    ],
)
def test_killed_worker_changes_no_bit(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, world_size: int, point: str, rank: int, iter_num: int
) -> None:
    fault = Fault(point, iter_num, rank, tmp_path / "fired")
    check_that_a_kill_changes_no_bit(replace(tiny, num_workers=world_size), fault, undisturbed)


# By default tests/unit/distributed/test_adapter_training.py kills one of three ranks, without Ray.
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("point", "rank", "iter_num"),
    [
        ("exchanged", 1, 13),
        ("optimizer", 0, 10),
        ("copy", 1, 12),
        ("write", 2, 16),
        ("commit", 0, 12),
        ("evaluate", 1, 16),
    ],
)
def test_killed_worker_changes_no_bit_of_adapters(
    adapters: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, point: str, rank: int, iter_num: int
) -> None:
    fault = Fault(point, iter_num, rank, tmp_path / "fired")
    check_that_a_kill_changes_no_bit(replace(adapters, num_workers=3), fault, undisturbed)


def check_that_a_kill_changes_no_bit(config: TrainConfig, fault: Fault, undisturbed: Undisturbed) -> None:
    outcome = launch(config, worker_with(fault))
    assert fault.marker.exists(), "the fault did not fire"
    assert outcome.iter_num == config.max_iters
    assert attempts(config.out_dir) == 2
    assert causes(config.out_dir) == ["worker_lost"]
    assert steps_repeated(config.out_dir) == 0
    expected = undisturbed(config, config.max_workers)
    assert tensors_equal(final_state(config.out_dir), expected)
    assert final_state(config.out_dir).best_val_loss == expected.best_val_loss


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_kill_while_recovering_changes_no_bit(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, rank: int
) -> None:
    faults = [Fault("forward", 11, 1, tmp_path / "first"), Fault("restore", 0, rank, tmp_path / "second")]
    config = replace(tiny, num_workers=3)
    launch(config, worker_with(*faults))
    assert [fault.marker.exists() for fault in faults] == [True, True]
    assert causes(config.out_dir) == ["worker_lost", "worker_lost"]
    assert attempts(config.out_dir) == 2, "the one between them has not begun"
    assert steps_repeated(config.out_dir) == 0
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 3))


class RegistryTaken(Fault):
    """Ray's list of checkpoints cannot be written any more: a folder has its place."""

    def fire(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            registry = self.marker.parent / "run" / REGISTRY_FILE
            registry.unlink()
            registry.mkdir()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_registry_that_cannot_be_written_ends_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, num_workers=2, out_dir=str(tmp_path / "run"))
    launch(config, worker_with(RegistryTaken("forward", 14, 0, tmp_path / "fired")))
    assert (tmp_path / "run" / REGISTRY_FILE).is_dir(), "the fault did not fire"
    assert causes(config.out_dir) == []
    assert final_state(config.out_dir).iter_num == config.max_iters


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_stands_still_is_found_and_replaced(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    fault = Fault("forward", 13, 1, tmp_path / "fired", kind=signal.SIGSTOP)
    config = replace(tiny, num_workers=2, hang_timeout_s=6.0)
    launch(config, worker_with(fault))
    assert fault.marker.exists(), "the fault did not fire"
    assert causes(config.out_dir) == ["hang"]
    assert steps_repeated(config.out_dir) == 0
    stacks = [path.read_text() for path in Path(config.out_dir).glob("hang-*-rank0.txt")]
    assert len(stacks) == 1
    assert "loop.py" in stacks[0]
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("cluster")
def test_a_hang_is_told_as_one_on_busy_cores(tiny: TrainConfig, tmp_path: Path) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cpus())]
    try:
        for time_ in range(20):
            fault = Fault("forward", 13, 1, tmp_path / f"fired{time_}", kind=signal.SIGSTOP)
            config = replace(tiny, num_workers=2, hang_timeout_s=8.0, out_dir=str(tmp_path / f"run{time_}"))
            launch(config, worker_with(fault))
            assert fault.marker.exists(), "the fault did not fire"
            assert causes(config.out_dir) == ["hang"], time_
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_bug_stops_the_run_when_it_shows_twice(tiny: TrainConfig, tmp_path: Path) -> None:
    fault = Fault("forward", 9, 1, tmp_path / "fired", kind=None, times=99)
    config = replace(tiny, num_workers=2)
    with pytest.raises(RunFailedError, match=r"(?s)same iteration \(9\), twice.*Rank 1.*ZeroDivisionError: the bug"):
        launch(config, worker_with(fault))
    assert causes(config.out_dir) == ["user_error", "user_error"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_error_that_passes_costs_no_step(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    fault = Fault("forward", 9, 0, tmp_path / "fired", kind=None)
    config = replace(tiny, num_workers=2)
    launch(config, worker_with(fault))
    assert causes(config.out_dir) == ["user_error"]
    assert steps_repeated(config.out_dir) == 0
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 2))


@pytest.mark.slow
def test_killed_driver_continues_when_started_again(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    marker, spec = tmp_path / "fired", tmp_path / "spec.json"
    fault = {"point": "after_optimizer", "iter_num": 14, "rank": 1, "marker": str(marker)}
    spec.write_text(json.dumps({"config": asdict(replace(tiny, num_workers=2)), "fault": fault}))
    command = [sys.executable, "-m", "tests.support.driver", str(spec)]
    killed = subprocess.run(command, timeout=120, capture_output=True, check=False, env=OWN_CLUSTER)
    assert marker.exists(), killed.stderr.decode()
    assert killed.returncode == -signal.SIGKILL
    again = subprocess.run(command, timeout=120, capture_output=True, check=False, text=True, env=OWN_CLUSTER)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == {"iter_num": tiny.max_iters}
    assert attempts(tiny.out_dir) == 2
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 2))


@pytest.mark.slow
def test_killed_controller_is_started_again(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    marker, spec = tmp_path / "fired", tmp_path / "spec.json"
    fault = {"point": "forward", "iter_num": 14, "rank": 1, "marker": str(marker)}
    spec.write_text(json.dumps({"config": asdict(replace(tiny, num_workers=2)), "fault": fault, "whom": "controller"}))
    command = [sys.executable, "-m", "tests.support.driver", str(spec)]
    done = subprocess.run(command, timeout=240, capture_output=True, check=False, text=True, env=OWN_CLUSTER)
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert causes(tiny.out_dir) == ["controller_lost"]
    assert attempts(tiny.out_dir) == 2
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 2))
