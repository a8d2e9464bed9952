"""A model and a dataset whose tokens differ in meaning are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import DataError, UserError
from orchestrator.loop import train
from tests.conftest import final_state
from tests.support.sources import beside, source_of_kind
from tests.support.weights import random_weights


def refused_twice(config: TrainConfig, told: str, kind: type[UserError] = DataError) -> None:
    """Check that the driver refuses it, and a worker that alone sees the data, too."""
    with pytest.raises(kind, match=told):
        plan(config)
    with pytest.raises(kind, match=told):
        train(resolve(config), World())


Source = Callable[[Snapshot, Path], str]


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "folder"])
def test_other_characters_are_refused(first: TrainConfig, tmp_path: Path, other_data: str, kind: str) -> None:
    saved = final_state(first.out_dir)
    source = source_of_kind(kind, first, tmp_path)
    config = beside(first, "again", init_from=source, max_iters=9, data_dir=other_data)
    chars = saved.config["tokenizer"]["chars"]
    told = f"have different vocabularies: .*token 3 is {chars[3]!r} to the model, {chars[5]!r} in the dataset"
    refused_twice(config, told)
    assert plan(replace(config, data_dir=first.data_dir)).start.iter_num in (0, 4)


def test_the_data_of_a_run_may_not_change_their_meaning(first: TrainConfig, other_data: str) -> None:
    refused_twice(
        replace(first, max_iters=9, data_dir=other_data), "has other tokens than the run in out_dir=.* token 3 is"
    )


def test_nanogpts_own_file_is_known_by_its_dataset(first: TrainConfig, tmp_path: Path, other_data: str) -> None:
    saved = final_state(first.out_dir)
    bare = replace(saved, config={"dataset": "before"})
    write_nanogpt(bare, tmp_path / "x.pt")
    config = beside(first, "again", init_from=str(tmp_path / "x.pt"), max_iters=9, data_dir=other_data)
    assert plan(config).start.iter_num == 4, "nothing tells what its tokens mean"
    shutil.copytree(Path(first.data_dir, "tiny"), Path(other_data, "before"))
    refused_twice(config, "token 3 is")


def test_gpt2s_weights_and_characters_are_refused(small: TrainConfig, tmp_path: Path) -> None:
    write_huggingface(random_weights(vocab_size=50257, n_embd=8), tmp_path / "hf")
    config = replace(small, init_from=str(tmp_path / "hf"))
    refused_twice(config, r"the model's tokens are GPT-2's, the dataset's \d+ characters")
    with pytest.raises(DataError, match="gpt2 and dataset=tiny have different vocabularies"):
        plan(replace(small, init_from="gpt2"))
    write_nanogpt(random_weights(vocab_size=50304, n_embd=8), tmp_path / "openwebtext.pt")
    refused_twice(replace(small, init_from=str(tmp_path / "openwebtext.pt")), "the model's tokens are GPT-2's")


def test_a_vocabulary_of_another_size_is_warned_about(
    small: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_huggingface(random_weights(vocab_size=5000), tmp_path / "hf")
    plan(replace(small, init_from=str(tmp_path / "hf")))
    assert "has vocab_size=5000, dataset=tiny" in caplog.text
