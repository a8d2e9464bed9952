"""Two drivers on one out_dir: the second is refused, a dead one is replaced, one that was cut off stops by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.lease import LEASE_FILE, Lease
from orchestrator.errors import ConfigError
from tests.conftest import Storage, Undisturbed, final_state
from tests.support.paused_driver import BEAT_INTERVAL_S
from tests.support.ray_runs import OWN_CLUSTER
from tests.support.runs import checkpoints_in
from tests.support.servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray and its parts warn of themselves


@dataclass(frozen=True)
class Driver:
    """A driver that runs; its workers wait at pause_at, if that is not None, until they are let go."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait_until_paused(self) -> None:
        deadline_s = time.monotonic() + 120
        while not (self.folder / "paused").exists():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline_s, self.log
            time.sleep(0.05)

    def let_go(self) -> None:
        (self.folder / "let_go").touch()


Start = Callable[..., Driver]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a driver process; none is left when the test ends."""
    started: list[Driver] = []

    def start(config: TrainConfig, pause_at: int | None = None) -> Driver:
        folder = tmp_path / f"driver{len(started)}"
        folder.mkdir()
        spec = folder / "spec.json"
        spec.write_text(json.dumps({"config": asdict(config), "pause_at": pause_at}))
        command = [sys.executable, "-m", "tests.support.paused_driver", str(spec)]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, env=OWN_CLUSTER, stdout=log, stderr=subprocess.STDOUT)
        started.append(Driver(folder, process))
        return started[-1]

    yield start
    for driver in started:
        driver.process.kill()
        driver.process.wait()


def test_second_driver_is_refused_and_an_evaluation_is_not(
    tiny: TrainConfig, start: Start, undisturbed: Undisturbed
) -> None:
    config = replace(tiny, num_workers=2)
    first = start(config, pause_at=10)
    first.wait_until_paused()
    before = run_json(config)

    second, evaluation = start(config), start(replace(config, num_workers=1, eval_only=True))
    assert second.process.wait(timeout=60) == 2, second.log
    assert f"is in use by the driver on {os.uname().nodename} (pid {first.process.pid}, " in second.log
    assert "give another --out_dir" in second.log
    assert "Traceback" not in second.log
    assert evaluation.process.wait(timeout=120) == 0, evaluation.log

    assert run_json(config) == before
    first.let_go()
    assert first.process.wait(timeout=60) == 0, first.log
    assert "attempt lost" not in first.log
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 2))
    assert not Path(config.out_dir, LEASE_FILE).exists()


def test_killed_driver_is_replaced_at_once_and_one_that_was_cut_off_stops(
    tiny: TrainConfig, start: Start, undisturbed: Undisturbed
) -> None:
    config = replace(tiny, num_workers=2)
    first = start(config, pause_at=10)
    first.wait_until_paused()
    of_first = run_json(config)
    first.process.kill()

    second = start(config, pause_at=14)
    second.wait_until_paused()
    assert f"(pid {first.process.pid}, " in second.log
    assert "is gone: taking over at once" in second.log
    assert "waiting up to" not in second.log
    assert run_json(config)["run_id"] == of_first["run_id"]
    assert run_json(config)["start_id"] != of_first["start_id"]
    second.process.send_signal(signal.SIGSTOP)

    third = start(config, pause_at=18)
    third.wait_until_paused()
    assert f"has shown no life for {3 * BEAT_INTERVAL_S:g} s: taking over" in third.log
    second.let_go()  # its workers go on too: nobody has told them
    second.process.send_signal(signal.SIGCONT)
    assert second.process.wait(timeout=60) == 1, second.log
    assert f"was taken over by the driver on {os.uname().nodename} (pid {third.process.pid}, " in second.log
    assert "Traceback" not in second.log

    third.let_go()
    assert third.process.wait(timeout=60) == 0, third.log
    assert "attempt lost" not in third.log
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 2))


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_lease_on_a_real_server(kind: str, request: pytest.FixtureRequest) -> None:
    storage: Storage = request.getfixturevalue(kind)
    store = checkpoints_in(f"{storage.url}/run", storage.options)
    first, second = Lease(store.folder, BEAT_INTERVAL_S), Lease(store.folder, BEAT_INTERVAL_S)
    first.wait_until_free()
    with first.held():
        first.confirm()
        assert store.names() == []  # from now on there is a listing that the client might believe
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
            second.wait_until_free()
        with second.held():
            assert first.check()
        assert store.folder.read_json(LEASE_FILE) == {}, "the one that was replaced does not come back"
    third = Lease(store.folder, BEAT_INTERVAL_S, sleep=lambda _s: pytest.fail("nobody is there to wait for"))
    third.wait_until_free()


def test_driver_survives_its_storage(s3: Storage, s3_server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    store = checkpoints_in(f"{s3.url}/run", s3.options)
    lease = Lease(store.folder, beat_interval_s=60)  # the beats are those of this test
    with lease.held():
        s3_server.kill()
        lease.beat()
        assert "the run goes on, but its driver cannot show that it is alive" in caplog.text
        s3_server.start()
        lease.beat()
        assert lease.successor is None
        assert store.folder.read_json(LEASE_FILE)["beat"] == 2
    assert store.folder.read_json(LEASE_FILE) == {}


def run_json(config: TrainConfig) -> dict[str, Any]:
    return dict(json.loads(Path(config.out_dir, "run.json").read_text()))
