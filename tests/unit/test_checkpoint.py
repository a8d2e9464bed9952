"""The checkpoint store: whole or absent, verified when read, the older one when the newer is damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig
from orchestrator.checkpoint.ownership import owners
from orchestrator.checkpoint.restore import begin
from orchestrator.checkpoint.save import parameter_of, save
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError
from orchestrator.world import World

ARGS = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11, "bias": True, "dropout": 0.0}


def trained(iter_num: int) -> TrainState:
    """A small model after a few optimizer steps on noise."""
    torch.manual_seed(iter_num)
    model = GPT(GPTConfig(**ARGS))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    for _ in range(3):
        idx = torch.randint(11, (2, 4))
        _, loss = model(idx, idx)
        loss.backward()
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, optimizer, scaler, {"always_save_checkpoint": True}, iter_num, best_val_loss=2.0)


def saved(store: CheckpointStore, iter_num: int, val_loss: float | None = None, keep: int = 9) -> Snapshot:
    snapshot = capture(trained(iter_num), val_loss)
    assert save(snapshot, World(attempt="a"), store, {}, keep)
    return Snapshot(**{**vars(snapshot), "model": _copy(snapshot.model), "optimizer": _copy(snapshot.optimizer)})


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "run"))


@pytest.mark.parametrize("url", ["{tmp}/run", "file://{tmp}/run", "memory://{tmp}/run"])
def test_what_is_saved_is_read(tmp_path: Path, url: str) -> None:
    store = CheckpointStore(url.format(tmp=tmp_path))
    snapshot = saved(store, 5, val_loss=1.5)
    checkpoint = store.select("latest")
    read = store.read(checkpoint)
    assert tensors_equal(read, snapshot)
    assert (read.iter_num, read.best_val_loss, read.val_loss) == (5, 2.0, 1.5)
    assert read.param_groups == snapshot.param_groups
    assert read.model_args == asdict(GPTConfig(**ARGS))


def test_model_files_are_plain_safetensors_with_nanogpt_names(store: CheckpointStore) -> None:
    snapshot = saved(store, 5)
    tensors = load_file(store.path("checkpoint_00000005_a", "model-00000-of-00001.safetensors"))
    assert tensors.keys() == {name for name, _ in GPT(GPTConfig(**ARGS)).named_parameters()}
    assert all(torch.equal(tensors[name], snapshot.model[name]) for name in tensors)


def test_model_only_never_opens_an_optimizer_file(store: CheckpointStore) -> None:
    snapshot = saved(store, 5)
    store.fs.rm(store.path("checkpoint_00000005_a", "optimizer-00000-of-00001.safetensors"))
    read = store.read(store.select(), model_only=True)
    assert not read.optimizer
    assert all(torch.equal(read.model[name], snapshot.model[name]) for name in snapshot.model)


def test_nothing_exists_before_it_is_announced(store: CheckpointStore) -> None:
    saved(store, 5)
    store.fs.rm(store.path("checkpoint_00000005_a", "state.json"))
    assert list(store.newest_first()) == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        store.select()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lengthen, Path.unlink])
@pytest.mark.parametrize(
    "file", ["model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors", "state.json"]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    store: CheckpointStore,
    tiny: TrainConfig,
    damage: Callable[[Path], None],
    file: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    older, _ = saved(store, 4), saved(store, 8)
    damage(Path(store.path("checkpoint_00000008_a", file)))
    config = replace(tiny, init_from="scratch", dropout=0.0)
    with caplog.at_level(logging.WARNING):
        state = begin(config, World(), store, ARGS)
    assert state.iter_num == 4
    assert tensors_equal(capture(state), older)
    never_announced = (file, damage) == ("state.json", Path.unlink)
    assert never_announced or "checkpoint_00000008_a" in caplog.text


def test_a_checkpoint_of_a_newer_program_is_not_guessed_at(store: CheckpointStore) -> None:
    saved(store, 4)
    path = Path(store.path("checkpoint_00000004_a", "state.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(CheckpointError, match="update this program"):
        store.load("checkpoint_00000004_a")


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    for iter_num, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        saved(store, iter_num, val_loss, keep=2)
    assert [checkpoint.iter_num for checkpoint in store.newest_first()] == [5, 4, 2]
    assert store.select("best").iter_num == 2
    assert store.select("latest").iter_num == 5


def test_pruning_removes_what_was_abandoned_but_not_what_may_be_being_written(store: CheckpointStore) -> None:
    saved(store, 4)
    for name in ("checkpoint_00000003_b", "checkpoint_00000009_b"):
        store.fs.makedirs(store.path(name))
    assert store.prune(keep=1) == ["checkpoint_00000003_b"]
    assert store.names() == ["checkpoint_00000009_b", "checkpoint_00000004_a"]


def test_pruning_keeps_what_could_not_be_read(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for iter_num in (1, 2, 3):
        saved(store, iter_num)
    read = store.fs.cat_file

    def refuse(path: str) -> bytes:
        if "checkpoint_00000002_a" in path:
            raise OSError("the storage has hiccups")
        return bytes(read(path))

    monkeypatch.setattr(store.fs, "cat_file", refuse)
    assert store.prune(keep=1) == ["checkpoint_00000001_a"]
    monkeypatch.undo()
    assert [checkpoint.iter_num for checkpoint in CheckpointStore(store.out_dir).newest_first()] == [3, 2]


def test_a_failing_storage_is_a_warning_and_leaves_the_older_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(store, 4)

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(store.fs, "open", refuse)
    assert save(capture(trained(8)), World(attempt="a"), store, {}, keep=1) is None
    assert "checkpoint_00000008_a was not saved: rank 0: OSError: no space left on device" in caplog.text
    monkeypatch.undo()
    assert store.select().iter_num == 4


def test_ranks_own_equal_shares() -> None:
    with torch.device("meta"):
        tensors = dict(GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768)).named_parameters())
    for world_size in (1, 2, 3, 4):
        owner = owners(tensors, world_size)
        load = [sum(tensors[name].nbytes for name in tensors if owner[name] == rank) for rank in range(world_size)]
        largest_tensor = max(tensor.nbytes for tensor in tensors.values())
        assert max(load) <= max(largest_tensor, 1.1 * sum(load) / world_size)
    assert [parameter_of(key) for key in ("exp_avg.a.b", "exp_avg_sq.a.b", "a.b", "step")] == [
        "a.b",
        "a.b",
        "a.b",
        "step",
    ]
