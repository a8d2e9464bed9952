"""The checkpoint store: whole or absent, verified when read, the older one when the newer is damaged."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig
from model.pretrained import GPT2_SIZES
from orchestrator.checkpoint.nodes import Nodes
from orchestrator.checkpoint.ownership import owners
from orchestrator.checkpoint.restore import begin
from orchestrator.checkpoint.saver import Saver
from orchestrator.checkpoint.schedule import Rhythm
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError, StorageError
from orchestrator.world import World

NO_MEMORY = Nodes(None, ("0",), 0)
ARGS = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11, "bias": True, "dropout": 0.0}
ARGS_OF_CONFIG = {key: value for key, value in ARGS.items() if key != "vocab_size"}


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
    config = {"always_save_checkpoint": True, "init_from": "scratch"}
    return TrainState(model, optimizer, scaler, config, iter_num, best_val_loss=2.0)


def saved(store: CheckpointStore, iter_num: int, val_loss: float | None = None, keep: int = 9) -> Snapshot:
    state = trained(iter_num)
    snapshot = capture(state, val_loss)
    save(store, state, val_loss, keep)
    return Snapshot(**{**vars(snapshot), "model": _copy(snapshot.model), "optimizer": _copy(snapshot.optimizer)})


def save(store: CheckpointStore, state: TrainState, val_loss: float | None = None, keep: int = 9) -> None:
    """Write a checkpoint straight from the live tensors, and wait for it."""
    saver = Saver(state, World(attempt="a"), store, NO_MEMORY, {}, Rhythm(1, keep=keep))
    saver.offer(state, val_loss, is_last=True)
    saver.close(is_finished=True)


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
    config = replace(tiny, **ARGS_OF_CONFIG)
    with caplog.at_level(logging.WARNING):
        state = begin(config, World(), store, NO_MEMORY, ARGS)
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


def test_a_failing_storage_leaves_the_older_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(store, 4)

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(store.fs, "open", refuse)
    with pytest.raises(StorageError, match=r"the last state could not be saved: rank 0: OSError.*no space left"):
        save(store, trained(8))
    monkeypatch.undo()
    assert store.select().iter_num == 4


@pytest.mark.parametrize(("size", "world_sizes"), [("gpt2", (1, 2, 3, 4, 8)), ("gpt2-xl", (2, 7, 16, 48))])
def test_ranks_own_equal_shares(size: str, world_sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = dict(GPT(GPTConfig(**GPT2_SIZES[size])).named_parameters())
    state = {f"{kind}{name}": tensor for kind in ("", "exp_avg.", "exp_avg_sq.") for name, tensor in model.items()}
    for world_size in world_sizes:
        owner = owners(state, world_size)
        load = [sum(state[name].nbytes for name in state if owner[name] == rank) for rank in range(world_size)]
        assert max(load) <= 1.1 * min(load)
