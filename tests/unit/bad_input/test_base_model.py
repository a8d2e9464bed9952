"""A run of adapters whose base model is gone, damaged or another one: nothing is started, nothing is changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.config import TrainConfig, check
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train
from tests.conftest import final_state
from tests.support.commands import Refused, flags
from tests.support.damage import flip_a_bit
from tests.support.runs import checkpoints_in

REMEDY = "--lora_base=PATH"


def other(base: Snapshot) -> Snapshot:
    """Return a model of the same shapes, of which one weight is another one."""
    name = "transformer.h.1.mlp.c_proj.weight"
    weight = base.model[name].clone()
    weight[3, 4] += 0.25
    return replace(base, model={**base.model, name: weight})


def damage(_other: Snapshot, path: Path) -> None:
    flip_a_bit(path / checkpoints_in(str(path)).select("latest").name, "model-00000-of-00001.safetensors")


def delete_checkpoints(_other: Snapshot, path: Path) -> None:
    for name in checkpoints_in(str(path)).names():
        shutil.rmtree(path / name)


def delete(_other: Snapshot, path: Path) -> None:
    path.unlink()


@pytest.fixture
def begun(adapters: TrainConfig, base_run: str, tmp_path: Path) -> Callable[[str], TrainConfig]:
    """Return a function that begins a run of adapters beside a base of a kind, which lies in tmp_path/base."""

    def begin(kind: str) -> TrainConfig:
        path, state = tmp_path / "base", final_state(base_run)
        if kind == "run":
            shutil.copytree(base_run, path)
        else:
            {"ckpt.pt": write_nanogpt, "folder": write_huggingface}[kind](state, path)
        config = replace(adapters, init_from=str(path), max_iters=4, num_workers=1, out_dir=str(tmp_path / "run"))
        train(resolve(config), World(attempt="a"))
        return replace(config, max_iters=8)

    return begin


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        (
            "ckpt.pt",
            write_nanogpt,
            "is not the base model that these adapters were trained beside: its checksum differs",
        ),
        ("folder", write_huggingface, "its checksum differs from the one in the run's state"),
        ("run", damage, "is damaged: its checksum differs"),
        ("run", delete_checkpoints, "the base model of these adapters is missing"),
        ("ckpt.pt", delete, "is neither scratch, resume, gpt2"),
    ],
)
def test_a_base_model_that_has_changed(
    refused: Refused,
    begun: Callable[[str], TrainConfig],
    base_run: str,
    tmp_path: Path,
    kind: str,
    change: Callable[[Snapshot, Path], None],
    told: str,
) -> None:
    config = begun(kind)
    change(other(final_state(base_run)), tmp_path / "base")
    said = refused("train", *flags(config))
    assert told in said
    assert REMEDY in said


def test_the_right_base_model_elsewhere_goes_on_to_the_same_bits(
    begun: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    config = begun("ckpt.pt")
    straight = replace(config, out_dir=str(tmp_path / "straight"))
    train(resolve(straight), World(attempt="b"))
    (tmp_path / "base").rename(tmp_path / "moved")
    train(resolve(check(replace(config, lora_base=str(tmp_path / "moved")))), World(attempt="c"))
    assert tensors_equal(final_state(config.out_dir), final_state(straight.out_dir))
