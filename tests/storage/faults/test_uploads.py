"""Storage fails while a run uploads to it: training goes on, and ends with the bits of a calm run.

The servers are real, and fail for real: we kill them, fill their disk, and put a proxy before them that answers errors,
breaks connections or says nothing. Each test shows that its fault fired.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from orchestrator.errors import StorageError
from orchestrator.storage import retry
from orchestrator.storage.location import locate
from orchestrator.storage.run_folder import RunFolder
from tests.conftest import Storage
from tests.support.proxy import FaultyProxy
from tests.support.runs import metrics_in
from tests.support.servers import S3Server, SFTPServer
from tests.support.storage_runs import Calm, Run, check_whole, fault_of, kinds, newest_whole, puts, slow, wait_for
from tests.support.tmpfs import small_tmpfs


@kinds("503", "reset")
def test_a_fault_that_passes_is_outlasted(
    kind: str, reason: str, on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm, caplog: pytest.LogCaptureFixture
) -> None:
    times = 4 if kind == "reset" else 2  # aiohttp sends once more where a connection that was used before breaks
    fault = fault_of(kind, proxy, puts("model-"), times)
    run = Run(on_s3, mark=lambda: fault.fired).train()
    assert fault.fired == times
    assert [text for text in caplog.messages if "trying again (2)" in text and reason in text]
    assert run.of("checkpoint_failed") == []
    assert run.steps_meanwhile("checkpoint") >= 1
    check_whole(on_s3, calm(on_s3))


@kinds("500")
def test_a_fault_that_lasts_costs_a_checkpoint(
    kind: str, reason: str, on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)
    run = Run(on_s3)
    fault = fault_of(kind, proxy, lambda *asked: run.has("checkpoint") and puts("optimizer-")(*asked), times=10**6)
    run.mark = lambda: fault.fired
    healed: list[int] = []

    def heal() -> None:
        if run.has("checkpoint_failed") and not healed:
            healed.append(newest_whole(on_s3))
            proxy.heal()

    run.slowly(lambda: healed, heal).train()
    assert fault.fired >= 2
    (failed,) = run.of("checkpoint_failed")
    assert reason in run.why(failed)
    assert healed == run.of("checkpoint")[:1]
    assert run.steps_meanwhile("checkpoint_failed") >= 1
    assert run.of("step") == list(range(40))
    check_whole(on_s3, calm(on_s3))


def test_the_last_state_waits_in_node_memory_where_storage_is_gone(
    on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)
    fault = fault_of("500", proxy, puts("checkpoint_00000040_"), times=10**6)
    run = Run(on_s3, mark=lambda: fault.fired)
    with pytest.raises(StorageError, match=r"could not be saved: rank 0: the server has failed .* as the test asked"):
        run.train()
    assert fault.fired >= 2
    assert newest_whole(on_s3) < 40
    proxy.heal()
    again = Run(on_s3, "b").train()
    assert again.records[0]["from"] == "checkpoint_00000040_a"
    assert again.records[0]["from_storage_bytes"] == 0
    assert again.of("checkpoint") == [40]
    check_whole(on_s3, calm(on_s3))


def test_slow_storage_gets_the_newest_states_and_steps_do_not_wait(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, calm: Calm
) -> None:
    config = replace(config, out_dir=f"{faulty_s3.url}/run", checkpoint_interval=4)
    proxy.bytes_per_s = 250e3
    run = Run(config, mark=lambda: sum(puts("/model-")(*asked) for asked in proxy.traffic.seen)).train()
    saved, skipped = run.of("checkpoint"), run.of("checkpoint_skipped")
    assert skipped
    assert {*range(4, 41, 4)} <= {*saved, *skipped}, "none is lost without a word"
    assert not {*saved} & {*skipped}
    assert saved[-1] == 40
    assert run.steps_meanwhile("checkpoint") >= 8, "two more came due while the first was on its way"
    whys = {record["why"] for record in run.records if record["kind"] == "checkpoint_skipped"}
    assert whys == {"the one before was still being saved"}
    check_whole(config, calm(config))


@pytest.mark.parametrize("in_parts", [slow(False), True], ids=["one put", "multipart"])
def test_s3_is_killed_in_mid_upload_and_comes_back(
    in_parts: bool, large: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, s3_server: S3Server, calm: Calm
) -> None:
    options = {"default_block_size": 5 * 2**20} if in_parts else {}
    config = replace(large, out_dir=f"{faulty_s3.url}/run", storage_options=json.dumps(options))
    wanted = "optimizer-"
    is_back = threading.Event()
    killed_at: list[int] = []

    def has_begun() -> bool:
        """Is a body on its way?"""
        paths = [path for method, path in proxy.traffic.seen if method == "PUT" and wanted in path]
        return bool([path for path in paths if not in_parts or "partNumber=" in path])

    def kill() -> None:
        wait_for(has_begun)
        before = proxy.traffic.bytes_up
        wait_for(lambda: proxy.traffic.bytes_up > before + 200_000)
        killed_at.append(proxy.traffic.bytes_up - before)
        s3_server.kill()
        time.sleep(1.0)
        proxy.bytes_per_s = None
        s3_server.start()
        is_back.set()

    proxy.bytes_per_s = 8e6
    killer = threading.Thread(target=kill)
    killer.start()
    run = Run(config, mark=lambda: len(killed_at))
    run.slowly(is_back.is_set, pause_s=0.25).train()
    killer.join()
    assert killed_at[0] < 6e6, "in the middle of it"
    assert run.steps_meanwhile("checkpoint") >= 1
    check_whole(config, calm(config))


def test_sftp_is_killed_in_mid_upload_and_comes_back(
    large: TrainConfig, sftp: Storage, sftp_server: SFTPServer, calm: Calm, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(large, out_dir=f"{sftp.url}/run", storage_options=json.dumps(sftp.options))
    folder = Path(sftp.url.partition(f":{sftp_server.port}")[2], "run")
    is_back = threading.Event()
    killed_at: list[int] = []

    def sizes() -> list[int]:
        return [path.stat().st_size for path in folder.glob("checkpoint_*/optimizer-*")]

    def kill() -> None:
        wait_for(lambda: max(sizes(), default=0) > 100_000, pause_s=0.0005)
        sftp_server.kill()
        killed_at.extend(sizes())
        time.sleep(1.0)
        sftp_server.start()
        is_back.set()

    killer = threading.Thread(target=kill)
    killer.start()
    run = Run(config, mark=lambda: len(killed_at)).slowly(is_back.is_set, pause_s=0.25).train()
    killer.join()
    assert killed_at[0] < 6e6, "in the middle of it"
    assert [text for text in caplog.messages if "trying again" in text]
    assert run.of("checkpoint_failed") == []
    assert run.steps_meanwhile("checkpoint") >= 1
    check_whole(config, calm(config))


@pytest.mark.parametrize("kind", ["disk", "sftp"])
def test_a_full_disk_costs_a_checkpoint_and_no_room(
    kind: str, config: TrainConfig, tmp_path: Path, calm: Calm, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with ExitStack() as mounts:
        if kind == "sftp":
            sftp, server = request.getfixturevalue("sftp"), request.getfixturevalue("sftp_server")
            folder = mounts.enter_context(small_tmpfs(server.files / tmp_path.name, "4m"))
            config = replace(config, out_dir=f"{sftp.url}/run", storage_options=json.dumps(sftp.options))
            monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)  # the protocol has no word for it: it is tried again
        else:
            folder = mounts.enter_context(small_tmpfs(tmp_path / "disk", "4m"))
            config = replace(config, out_dir=f"{folder}/run")
        ballast = Path(folder, "ballast")
        run = Run(config, mark=ballast.exists)
        left: list[int] = []

        def fill_and_free() -> None:
            if run.has("checkpoint") and not left and not ballast.exists():
                fill(ballast, but_bytes=150_000)
            elif run.has("checkpoint_failed") and ballast.exists():
                assert newest_whole(config) == run.of("checkpoint")[0]
                left.append(len(list(Path(folder, "run").glob("checkpoint_*"))))
                ballast.unlink()

        run.slowly(lambda: left, fill_and_free).train()
        (failed,) = run.of("checkpoint_failed")
        assert run.steps_meanwhile("checkpoint_failed") >= 1
        if kind == "disk":
            assert f"[Errno {errno.ENOSPC}]" in run.why(failed)
            assert not [text for text in caplog.messages if "trying again (" in text]
            assert left == [1], "what had been written of it was taken back"
            assert {r["iter"] for r in metrics_in(config.out_dir) if r["kind"] == "step"} == set(range(40))
        check_whole(config, calm(config))
        assert len(list(Path(folder, "run").glob("checkpoint_*"))) <= config.keep_checkpoints + 1


def fill(path: Path, but_bytes: int) -> None:
    """Write a file that leaves so much room on its disk."""
    stat = os.statvfs(path.parent)
    path.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - but_bytes)))


def test_an_upload_whose_end_was_lost_is_sent_again(
    large: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, calm: Calm
) -> None:
    """The server has forgotten an upload in parts: somebody took it back, or the answer to its completion was lost."""
    options = {"default_block_size": 5 * 2**20}
    config = replace(large, out_dir=f"{faulty_s3.url}/run", storage_options=json.dumps(options))
    is_end = lambda method, path: method == "POST" and "optimizer-" in path and "uploadId" in path
    forgotten = proxy.answer(404, "NoSuchUpload", is_end)
    run = Run(config, mark=lambda: forgotten.fired).train()
    assert forgotten.fired == 1
    assert run.of("checkpoint_failed") == []
    check_whole(config, calm(config))


def test_all_have_one_client_with_limits_unless_the_user_gives_others(s3: Storage) -> None:
    fs, _ = locate(f"{s3.url}/run")
    assert locate(f"{s3.url}/run/file")[0] is fs
    assert RunFolder(f"{s3.url}/run").fs is fs
    limits = fs.config_kwargs
    assert (limits["read_timeout"], limits["retries"]["total_max_attempts"], fs.retries) == (15, 3, 2)
    others, _ = locate(s3.url, {"config_kwargs": {"read_timeout": 99}})
    assert others.config_kwargs == {"read_timeout": 99}
    assert others.retries == type(fs).retries
