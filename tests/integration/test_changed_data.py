"""A token file that is cut while a run reads it: workers die of SIGBUS, and the run says why and tries no more."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.numerics import NumericsFingerprint
from orchestrator.distributed.world import World
from orchestrator.driver.launch import launch
from orchestrator.errors import UserError
from orchestrator.loop import train
from tests.support.clusters import small_cluster
from tests.support.faults import Fault, worker_with
from tests.support.runs import events_in


@pytest.fixture
def nanogpts(tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A folder as nanoGPT's prepare.py makes it: nothing in it says how long the token files are."""
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, count in (("train", 1_000_000), ("val", 10_000)):
        draw.integers(0, 65, count, dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    return replace(tiny, data_dir=str(folder.parent), dataset="mine")


@pytest.fixture
def cluster() -> Iterator[None]:
    with small_cluster():
        yield


class Cut(Fault):
    """The train.bin of `folder` loses its second half, in place: whoever reads there gets SIGBUS."""

    def fire(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            os.truncate(self.marker.parent / "data" / "mine" / "train.bin", 1_000_000)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("default")
def test_a_file_that_is_cut_ends_the_run_with_a_line(nanogpts: TrainConfig, tmp_path: Path) -> None:
    config = replace(nanogpts, num_workers=2, max_iters=1000, eval_interval=1000)
    with pytest.raises(
        UserError, match=r"mine was changed while .*: train\.bin had 1,000,000 tokens, now 500,000\. Put"
    ):
        launch(config, worker_with(Cut("forward", 9, 0, tmp_path / "fired")))
    assert (tmp_path / "fired").exists()
    failures = [event for event in events_in(config.out_dir) if event["kind"] == "failure"]
    assert [event["cause"] for event in failures] == ["worker_lost"], "it is started once more, and sees it then"


def test_a_new_command_may_have_other_data_and_says_so_loudly(
    nanogpts: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    train(resolve(replace(nanogpts, max_iters=4)), World(attempt="a"))
    os.truncate(Path(nanogpts.data_dir, "mine", "train.bin"), 1_000_000)
    with caplog.at_level(logging.WARNING):
        outcome = train(resolve(replace(nanogpts, max_iters=6)), World(attempt="b"))
    assert outcome.iter_num == 6
    assert "THE DATASET IS NOT THE ONE" in caplog.text
    assert "train.bin had 1,000,000 tokens, now 500,000; it goes on with this one" in caplog.text
    assert "the last bits may differ" not in caplog.text


def change_of_data(before: dict[str, Any], now: dict[str, Any]) -> str:
    return NumericsFingerprint.from_json(now).change_of_data(NumericsFingerprint.from_json(before))


def test_what_has_changed_is_told() -> None:
    now = {"data": "b", "train_tokens": 5, "val_tokens": 6}
    assert change_of_data(now, now) == ""
    assert change_of_data({**now, "data": "a"}, now) == "as many tokens, but others"
    assert change_of_data({"data": "a"}, now) == "as many tokens, but others", "a run of before knows no counts"
    assert change_of_data({}, now) == ""
    assert change_of_data({"data": "a", "train_tokens": 7, "val_tokens": 6}, now) == "train.bin had 7 tokens, now 5"
