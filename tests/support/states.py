"""States with random numbers, and the checkpoint of a run that has one rank."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from model import parameter_shapes
from orchestrator.checkpoint.save.plan import files_of, tensor_index, tensors_in
from orchestrator.checkpoint.save.upload import commit, upload
from orchestrator.checkpoint.snapshot import Snapshot, describe
from orchestrator.checkpoint.store import ADAPTER_FORMAT_VERSION, FORMAT_VERSION, checkpoint_name
from orchestrator.checkpoint.tensor_file import tensor_pieces
from orchestrator.distributed.world import World
from tests.support.runs import checkpoints_in

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11, "bias": True, "dropout": 0.0}


def random_state(args: dict[str, object], iter_num: int = 5) -> Snapshot:
    draw = torch.Generator().manual_seed(iter_num)
    model = {name: torch.randn(shape, generator=draw) for name, shape in parameter_shapes(args).items()}
    moments = {f"{slot}.{name}": x.abs() for slot in ("exp_avg", "exp_avg_sq") for name, x in model.items()}
    optimizer = {**moments, "step": torch.tensor(float(iter_num))}
    return Snapshot(model, optimizer, (), {**args, "activation": "gelu"}, iter_num, best_val_loss=2.0)


def save_run(out_dir: Path, snapshot: Snapshot) -> str:
    store, name = checkpoints_in(str(out_dir)), checkpoint_name(snapshot.iter_num, "local")
    files = files_of(snapshot, world_size=1)
    version = ADAPTER_FORMAT_VERSION if snapshot.adapters else FORMAT_VERSION
    described = {"format_version": version, **describe(snapshot), "environment": {}, "saved_at_s": 0.0}
    part = upload(store, name, {file: partial(tensor_pieces, tensors_in(slices)) for file, slices in files.items()}, {})
    assert commit(World(), store, name, part, {**described, "tensors": tensor_index(files)}, keep=9) is None
    return name
