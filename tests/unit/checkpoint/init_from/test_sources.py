"""New runs from runs, ckpt.pt files and folders: what they take along, and what cannot be meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from orchestrator.checkpoint.formats.nanogpt import read_nanogpt, write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.store import parse_state, state_text
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.loop import train
from tests.conftest import final_state
from tests.support import ranks
from tests.support.sources import begun, beside, names, source_of_kind


def test_a_run_is_gone_on_with_elsewhere_to_the_same_bits(first: TrainConfig) -> None:
    again = beside(first, "again", init_from=first.out_dir, max_iters=8)
    began, end = begun(again)
    assert began == 4
    train(resolve(replace(first, max_iters=8)), World())
    straight = final_state(first.out_dir)
    assert tensors_equal(end, straight)
    assert (end.iter_num, end.best_val_loss) == (8, straight.best_val_loss)
    assert plan(replace(again, max_iters=9)).start.iter_num == 8, "the same command goes on with its own out_dir"


@pytest.mark.parametrize("by", ["path", "key", "url", "best"])
def test_one_of_its_checkpoints_is_chosen(first: TrainConfig, by: str) -> None:
    path = Path(first.out_dir, names(first)[2], "state.json")
    if by == "best":  # make the older one the better
        make_best(path)
    source = {"path": str(path.parent), "url": path.parent.as_uri()}.get(by, first.out_dir)
    which = {"key": names(first)[2], "best": "best"}.get(by, "auto")
    began, _ = begun(beside(first, "again", init_from=source, init_checkpoint=which))
    assert began == 2


def make_best(path: Path) -> None:
    state = parse_state(path.read_bytes(), "")
    path.write_text(state_text({**state, "val_loss": 0.5}))


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "folder"])
def test_weights_alone_begin_at_0_with_new_moments(first: TrainConfig, tmp_path: Path, kind: str) -> None:
    saved = final_state(first.out_dir)
    source = source_of_kind(kind, first, tmp_path)
    still = {"learning_rate": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    config = beside(first, "tuned", init_from=source, init_weights_only=True, max_iters=1, **still)
    began, end = begun(config)
    assert (began, end.iter_num, end.optimizer["step"].item()) == (0, 1, 1.0)
    assert end.best_val_loss < 1e9, "the first evaluation is the best one"
    assert all(torch.equal(end.model[name], tensor) for name, tensor in saved.model.items()), (
        "such a rate moves nothing"
    )


def test_weights_alone_are_taken_of_a_file_with_another_optimizer(first: TrainConfig, tmp_path: Path) -> None:
    write_nanogpt(final_state(first.out_dir), path := tmp_path / "x.pt")
    content = torch.load(path, weights_only=True)
    content["optimizer"] = {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save(content, path)
    config = beside(first, "tuned", init_from=str(path), max_iters=5)
    with pytest.raises(CheckpointError, match=r"groups have no betas, but lr.*--init_weights_only=True"):
        plan(config)
    assert begun(replace(config, init_weights_only=True))[0] == 0


def test_a_damaged_checkpoint_of_the_source_falls_back_or_is_named(
    first: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(first.out_dir, names(first)[4], "model-00000-of-00001.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = beside(first, "again", init_from=first.out_dir, max_iters=6)
    named = replace(config, init_checkpoint=names(first)[4])
    with pytest.raises(CheckpointError, match=r"model-00000-of-00001\.safetensors is damaged: its checksum differs"):
        train(resolve(named), World())
    assert begun(config)[0] == 2
    assert f"checkpoint {names(first)[4]} is not whole, falling back to the one before" in caplog.text


def test_a_run_at_a_url(first: TrainConfig) -> None:
    memory = fsspec.filesystem("memory")
    for path in Path(first.out_dir).rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/begin-from/{path.relative_to(first.out_dir)}", path.read_bytes())
    began, end = begun(beside(first, "again", init_from="memory://begin-from", max_iters=6))
    assert (began, end.iter_num) == (4, 6)


@pytest.mark.slow
def test_a_run_is_gone_on_with_on_two_ranks(first: TrainConfig, tmp_path: Path) -> None:
    two = beside(first, "two", init_from=first.out_dir, max_iters=6, gradient_accumulation_steps=2)
    ended = ranks.train(two, 2, tmp_path / "log", memory_dirs=[first.memory_dir] * 2)
    assert ended.is_done, ended.said
    assert final_state(two.out_dir).iter_num == 6


def test_what_chooses_must_have_something_to_choose_from(first: TrainConfig, tmp_path: Path) -> None:
    write_nanogpt(final_state(first.out_dir), tmp_path / "x.pt")
    config = beside(first, "again", max_iters=9)
    for changes, told in (
        ({"init_weights_only": True}, "init_from=scratch has none: give --init_from"),
        ({"init_checkpoint": "best"}, "chooses a checkpoint of another run: give --init_from=RUN"),
        ({"init_from": str(tmp_path / "x.pt"), "init_checkpoint": "best"}, "but .*x.pt is nanoGPT's ckpt.pt"),
        ({"init_from": f"{first.out_dir}/{names(first)[2]}", "init_checkpoint": "best"}, "is one checkpoint, but"),
    ):
        with pytest.raises(ConfigError, match=told):
            plan(replace(config, **changes))
    with pytest.raises(CheckpointError, match=f"init_from={first.out_dir} holds no whole checkpoint checkpoint_9;"):
        plan(replace(config, init_from=first.out_dir, init_checkpoint="checkpoint_9"))


def test_another_beginning_of_the_same_out_dir_is_refused(first: TrainConfig) -> None:
    again = beside(first, "again", init_from=first.out_dir, init_checkpoint=names(first)[2])
    begun(again)
    more = replace(again, max_iters=9)
    with pytest.raises(ConfigError, match="begun with init_checkpoint=checkpoint_00000002_local, asked for init_check"):
        plan(replace(more, init_checkpoint="latest"))
    for changes in ({}, {"init_from": "resume", "init_checkpoint": "auto"}):
        with pytest.raises(
            ConfigError, match="holds a run, which goes on with all of its state; init_weights_only=True"
        ):
            plan(replace(more, init_weights_only=True, **changes))
        assert plan(replace(more, **changes)).start.iter_num == 4


def test_a_run_as_old_as_the_golden_one_lacks_the_new_keys(first: TrainConfig) -> None:
    for path in Path(first.out_dir).glob("checkpoint_*/state.json"):
        state = parse_state(path.read_bytes(), "")
        for key in ("init_checkpoint", "init_weights_only"):
            del state["config"][key]
        path.write_text(state_text(state))
    assert begun(replace(first, max_iters=5))[0] == 4


def test_read_nanogpt_is_not_asked_for_the_optimizer_of_an_evaluation(
    first: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nanogpt(final_state(first.out_dir), tmp_path / "x.pt")
    asked: list[bool] = []

    def noted(path: Any, *, model_only: bool = False, **options: Any) -> Snapshot:
        asked.append(model_only)
        return read_nanogpt(path, model_only=model_only, **options)

    monkeypatch.setattr("orchestrator.checkpoint.formats.weights.read_nanogpt", noted)
    config = beside(first, "evaluated", init_from=str(tmp_path / "x.pt"), eval_only=True)
    plan(config)
    train(resolve(config), World())
    assert asked
    assert all(asked)
