"""Whatever fails, only whole checkpoints are committed, and the process ends with an error that names the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from s3fs import S3FileSystem

from orchestrator.checkpoint.save import upload as durable
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.tensor_file import write_file
from orchestrator.config import TrainConfig
from orchestrator.storage import retry
from tests.conftest import Storage, Undisturbed
from tests.support import ranks
from tests.support.proxy import FaultyProxy
from tests.support.runs import metrics_in
from tests.support.servers import S3Server
from tests.support.storage_runs import Calm, Run, check_whole, fault_of, puts, slow


class Liar(LocalFileSystem):  # type: ignore[misc]
    """A disk that keeps half of each file and reports success. No real server can be made to lie like this."""

    cachable = False
    lies = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        if mode == "wb":
            Liar.lies += 1
            write = file.f.write
            file.write = lambda piece: write(piece[: len(piece) // 2])
        return file


def test_half_a_file_is_never_announced(config: TrainConfig, calm: Calm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)
    honest, run = write_file, Run(config)

    def lie_once(fs: Any, *rest: Any) -> Any:
        is_honest = not run.has("checkpoint") or run.has("checkpoint_failed")
        return honest(fs if is_honest else Liar(), *rest)

    monkeypatch.setattr(durable, "write_file", lie_once)
    run.slowly(lambda: run.has("checkpoint_failed")).train()
    assert Liar.lies >= 2, "it was tried again"
    (failed,) = run.of("checkpoint_failed")
    assert "but the storage holds" in run.why(failed)
    check_whole(config, calm(config))


def test_a_state_that_changes_in_node_memory_is_not_announced(
    on_s3: TrainConfig, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, run = SnapshotBuffer.publish, Run(on_s3)
    flipped: list[str] = []

    def seal_and_flip(slot: SnapshotBuffer, name: str, *rest: Any) -> None:
        seal(slot, name, *rest)
        if run.has("checkpoint") and not run.has("checkpoint_failed"):
            (path,) = Path(on_s3.memory_dir).rglob(f"{name}.*/optimizer-*")
            flip_bit(path)
            flipped.append(name)

    monkeypatch.setattr(SnapshotBuffer, "publish", seal_and_flip)
    run.slowly(lambda: run.has("checkpoint_failed")).train()
    (failed,) = run.of("checkpoint_failed")
    assert f"checkpoint_{failed:08d}_a" in flipped
    assert "DamagedSourceError: optimizer-00000-of-00001.safetensors changed in node memory" in run.why(failed)
    check_whole(on_s3, calm(on_s3))


def flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def set_patience(_rank: int) -> None:
    retry.RETRY_FOR_S = 0.2
    S3FileSystem.retries = 1


def test_a_fault_of_one_rank_is_told_by_all_and_the_next_checkpoint_is_whole(
    tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, s3_server: S3Server, undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The second of three ranks cannot write its share of the first checkpoint."""
    limits = {"retries": {"total_max_attempts": 1}}
    options = {
        "key": s3_server.key,
        "secret": s3_server.secret,
        "endpoint_url": proxy.endpoint,
        "config_kwargs": limits,
    }
    config = replace(tiny, out_dir=f"{faulty_s3.url}/run", storage_options=json.dumps(options))
    is_its = lambda method, path: bool(re.search(r"checkpoint_0000000[4-7]_.*00001-of-00003", path)) and method == "PUT"
    fault = proxy.answer(500, "InternalError", is_its, 10**6)
    ended = ranks.train(config, 3, tmp_path / "ranks.log", prepare=set_patience)
    assert ended.is_done, ended.said
    assert fault.fired >= 2
    failed = [r for r in metrics_in(config.out_dir, options) if r["kind"] == "checkpoint_failed"]
    assert failed
    assert max(record["iter"] for record in failed) < 8
    assert failed[0]["why"].startswith("rank 1: the server has failed (InternalError to PutObject")
    check_whole(config, undisturbed(tiny, 3))


ENDS = """
import sys
from orchestrator.storage import location, retry
retry.RETRY_FOR_S = 0.2
location._S3_LIMITS = {"read_timeout": 0.5, "retries": {"total_max_attempts": 1}}
from orchestrator.worker.plain import main
sys.exit(main())
"""


@pytest.mark.parametrize("kind", ["500", slow("hang")])
def test_the_process_ends_after_failed_uploads(
    kind: str, config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy
) -> None:
    fault = fault_of(kind, proxy, puts("/checkpoint_"), times=10**6)
    config = replace(config, out_dir=f"{faulty_s3.url}/run", max_iters=16)
    flags = [f"--{key}={value}" for key, value in vars(config).items()]
    done = subprocess.run([sys.executable, "-c", ENDS, *flags], timeout=60, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert fault.fired
    assert done.returncode == 1, said
    assert "error: out_dir=" in said
    assert "the last state could not be saved" in said
    assert "Traceback" not in said
    assert S3Server.secret not in said
