"""A base model on S3: one rank fetches it for all, once an attempt, and the ranks notice if it has changed."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.preflight import plan
from orchestrator.errors import StorageUnavailableError
from orchestrator.storage import retry
from tests.conftest import Storage, final_state
from tests.support import ranks
from tests.support.bases import WatchBase, held
from tests.support.faults import Fault
from tests.support.proxy import FaultyProxy
from tests.support.runs import metrics_in
from tests.support.storage_runs import Run, fault_of, gets


@pytest.mark.slow  # four groups of ranks, one after the other
def test_it_is_fetched_once_for_all_ranks_and_a_change_is_noticed(
    adapters: TrainConfig, base_run: str, faulty_s3: Storage, proxy: FaultyProxy, tmp_path: Path
) -> None:
    base, url = final_state(base_run), f"{faulty_s3.url}/base"
    weights_bytes = sum(tensor.nbytes for tensor in base.model.values())
    write_huggingface(base, url)
    watch = WatchBase(environment=proxy.environment)
    config = replace(adapters, init_from=url, lanes=3)

    def fetched_bytes(out_dir: str, size: int, *faults: Fault) -> int:
        before = proxy.traffic.bytes_down
        run = replace(config, out_dir=out_dir)
        ended.append(ranks.train(run, size, tmp_path / f"{len(ended)}.log", faults, prepare=watch))
        return proxy.traffic.bytes_down - before

    ended: list[ranks.Ended] = []
    fault = Fault("exchanged", 13, 1, tmp_path / "fired")
    sizes = [
        fetched_bytes(str(tmp_path / "straight"), 1),
        fetched_bytes(config.out_dir, 3, fault),
    ]
    plan(config)  # as a driver does, which looks at the headers alone
    sizes.append(fetched_bytes(config.out_dir, 2))
    assert weights_bytes <= min(sizes), "what goes through the proxy is counted"
    assert max(sizes) < 1.1 * sizes[0], "three ranks fetch no more than one"
    assert sizes[0] < 2.2 * weights_bytes, "the header, in a block as large as this file, and the file"
    assert ended[1].codes[1] == -signal.SIGKILL
    assert [ended[0].is_done, ended[2].is_done] == [True, True]
    assert len({one for each in ended for one in held(each)}) == 1
    assert tensors_equal(final_state(config.out_dir), final_state(str(tmp_path / "straight")))

    weight = base.model["transformer.h.0.mlp.c_fc.weight"]
    weight[0, 0] += 0.25
    write_huggingface(base, url)
    longer, before = replace(config, max_iters=48), metrics_in(config.out_dir)
    plan(longer)  # the sizes are the same
    refused = ranks.train(longer, 3, tmp_path / "refused.log", prepare=watch)
    assert refused.codes == [1, 1, 1], refused.said
    assert refused.said.count("CheckpointError") == 3
    assert f"{url} is not the base model that these adapters were trained beside: its checksum differs" in refused.said
    assert metrics_in(config.out_dir) == before, "no iteration has begun"


@pytest.mark.parametrize("kind", [pytest.param("503", marks=pytest.mark.slow), "reset"])
def test_storage_that_fails_while_it_is_read_ends_no_run(
    kind: str,
    adapters: TrainConfig,
    base_run: str,
    faulty_s3: Storage,
    proxy: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A restore tries again; what lasts longer fails the attempt, which may be started again, and not the run."""
    url = f"{faulty_s3.url}/base"
    write_huggingface(final_state(base_run), url)
    monkeypatch.setattr(retry, "READ_AGAIN_FOR_S", 2.0)
    config = replace(adapters, init_from=url)
    Run(replace(config, max_iters=4)).train()
    fault = fault_of(kind, proxy, gets("base/model.safetensors"), times=10**6)
    fault.after_bytes = 100
    with pytest.raises(StorageUnavailableError, match="the base model of these adapters"):
        Run(config, "b").train()
    assert fault.fired
    fault.fired = 10**6 - 3  # it passes
    Run(config, "c").train()
    assert final_state(config.out_dir).iter_num == config.max_iters
