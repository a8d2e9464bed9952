"""A run that begins with weights on S3: storage that fails for a while ends no run, whatever the weights are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.commands.export import ExportConfig, export
from orchestrator.config import TrainConfig
from orchestrator.errors import StorageUnavailableError
from orchestrator.storage import retry
from tests.conftest import Storage, final_state
from tests.support.proxy import FaultyProxy
from tests.support.storage_runs import Run, fault_of, gets


def put(source: str, base_run: str, tiny: TrainConfig, url: str) -> tuple[str, str]:
    """Put weights there; return what init_from says of them, and the name of their file."""
    match source:
        case "folder":
            write_huggingface(final_state(base_run), url)
            return url, "base/model.safetensors"
        case "ckpt.pt":
            export(ExportConfig(base_run, to=f"{url}/ckpt.pt"))
            return f"{url}/ckpt.pt", "base/ckpt.pt"
    Run(replace(tiny, out_dir=url, max_iters=2)).train()
    return url, "model-00000-of-00001.safetensors"


@pytest.mark.parametrize("source", ["folder", "ckpt.pt", "run"])
def test_storage_that_fails_while_it_is_read_ends_no_run(
    source: str,
    tiny: TrainConfig,
    base_run: str,
    faulty_s3: Storage,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where, file = put(source, base_run, tiny, f"{faulty_s3.url}/base")
    monkeypatch.setattr(retry, "READ_AGAIN_FOR_S", 2.0)
    config = replace(tiny, init_from=where, init_weights_only=True, out_dir=str(tmp_path / "tuned"), max_iters=2)
    fault = fault_of("reset", proxy, gets(file), times=10**6)
    fault.after_bytes = 100
    with pytest.raises(StorageUnavailableError, match=file.split("/")[-1]):
        Run(config).train()
    fired = fault.fired
    assert fired > 1, "it was tried again"
    fault.fired = 10**6 - 3  # it passes
    Run(config, "b").train()
    assert fault.fired == 10**6
    assert final_state(config.out_dir).iter_num == config.max_iters
