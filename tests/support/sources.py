"""Runs that begin from other runs, ckpt.pt files and Hugging Face folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import TrainConfig, check
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.loop import train
from orchestrator.training.attempt import Callbacks
from tests.conftest import final_state
from tests.support.runs import checkpoints_in


def begun(config: TrainConfig) -> tuple[int, Snapshot]:
    """Plan and train; return the iteration where that began, and the end."""
    plan(config)
    began: list[int] = []
    train(resolve(check(config)), World(), Callbacks(lambda record: began.append(record.iter)))
    return began[0], final_state(config.out_dir)


def beside(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    return replace(config, out_dir=str(Path(config.out_dir).with_name(name)), **changes)


def names(config: TrainConfig) -> dict[int, str]:
    return {checkpoint.iter_num: checkpoint.name for checkpoint in checkpoints_in(config.out_dir).newest_first()}


def source_of_kind(kind: str, first: TrainConfig, folder: Path) -> str:
    """Return where the first run's last state lies: the run itself, or a ckpt.pt or Hugging Face folder made of it."""
    saved = final_state(first.out_dir)
    source = {"run": first.out_dir, "ckpt.pt": str(folder / "x.pt"), "folder": str(folder / "hf")}[kind]
    if kind == "ckpt.pt":
        write_nanogpt(saved, source)
    elif kind == "folder":
        write_huggingface(saved, source, CharTokenizer(saved.config["tokenizer"]["chars"]))
    return source
