"""Storage fails while a run restores from it: it retries, and takes an older state only if a file cannot be read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config import TrainConfig
from orchestrator.storage import retry
from tests.conftest import Storage
from tests.support.proxy import FaultyProxy
from tests.support.storage_runs import Calm, Run, check_whole, fault_of, gets, slow, store_of


@pytest.mark.parametrize("kind", [slow("500"), slow("503"), "reset"])
def test_a_restore_outlasts_what_its_client_does(
    kind: str, config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, calm: Calm
) -> None:
    """With the client's own settings: it tries again by itself."""
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    Run(config, stop_after=19).train()
    fired = [fault_of(kind, proxy, gets(file), times=1) for file in ("model-", "optimizer-", "state.json")]
    for fault in fired:
        fault.after_bytes = 100
    again = Run(config, "b").train()
    assert [fault.fired for fault in fired] == [1, 1, 1]
    assert again.records[0]["from"] == "checkpoint_00000020_a"
    check_whole(config, calm(config))


@pytest.mark.parametrize(
    ("file", "kind"),
    [slow("model-", "500"), slow("model-", "reset"), slow("state.json", "503"), ("state.json", "reset")],
)
def test_a_restore_tries_again_before_it_takes_an_older_state(
    file: str, kind: str, on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm
) -> None:
    Run(on_s3, stop_after=19).train()
    fault = fault_of(kind, proxy, gets(f"checkpoint_00000020_a/{file}"), times=2)
    fault.after_bytes = 100
    again = Run(on_s3, "b").train()
    assert fault.fired == 2
    assert again.records[0]["from"] == "checkpoint_00000020_a"
    check_whole(on_s3, calm(on_s3))


@pytest.mark.parametrize("kind", [slow("500"), "reset", slow("hang")])
def test_a_file_that_cannot_be_read_is_named_and_an_older_state_used(
    kind: str,
    on_s3: TrainConfig,
    proxy: FaultyProxy,
    calm: Calm,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "READ_AGAIN_FOR_S", 0.2)
    Run(on_s3, stop_after=19).train()
    before = [checkpoint.iter_num for checkpoint in store_of(on_s3).newest_first()]
    fault = fault_of(kind, proxy, gets("checkpoint_00000020_a/model-"), times=10**6)
    fault.after_bytes = 100
    again = Run(on_s3, "b", each=proxy.heal).train()
    assert fault.fired
    assert again.records[0]["iter"] == before[1]
    told = [text for text in caplog.messages if "checkpoint_00000020_a is not whole, falling back" in text]
    assert "model-00000-of-00001.safetensors" in told[0]
    check_whole(on_s3, calm(on_s3))
