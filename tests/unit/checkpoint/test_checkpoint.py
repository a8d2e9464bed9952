"""The checkpoint store: whole or absent, verified when read, the older one when the newer is damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from model import GPT, GPTConfig
from model.pretrained import GPT2_SIZES
from orchestrator.checkpoint import tensor_file as files
from orchestrator.checkpoint.restore.restore import restore_or_initialize
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.plan import owners
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.checkpoint.tensor_file import FileRecord, write_file
from orchestrator.checkpoint.tensor_slice import replicate
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, StorageError
from tests.support.runs import checkpoints_in

NO_MEMORY = NodeTopology(None, ("0",), 0)
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
    saver = Saver(state, World(attempt="a"), store, NO_MEMORY, {}, SaveIntervals(1, keep=keep))
    saver.offer(state, val_loss, is_last=True)
    saver.close(is_finished=True)


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return checkpoints_in(str(tmp_path / "run"))


@pytest.mark.parametrize("url", ["{tmp}/run", "file://{tmp}/run", "memory://{tmp}/run"])
def test_what_is_saved_is_read(tmp_path: Path, url: str) -> None:
    store = checkpoints_in(url.format(tmp=tmp_path))
    snapshot = saved(store, 5, val_loss=1.5)
    checkpoint = store.select("latest")
    read = store.read(checkpoint)
    assert tensors_equal(read, snapshot)
    assert (read.iter_num, read.best_val_loss, read.val_loss) == (5, 2.0, 1.5)
    assert read.param_groups == snapshot.param_groups
    assert read.model_args == asdict(GPTConfig(**ARGS))


def test_model_files_are_plain_safetensors_with_nanogpt_names(store: CheckpointStore) -> None:
    snapshot = saved(store, 5)
    tensors = load_file(store.folder.path("checkpoint_00000005_a", "model-00000-of-00001.safetensors"))
    assert tensors.keys() == {name for name, _ in GPT(GPTConfig(**ARGS)).named_parameters()}
    assert all(torch.equal(tensors[name], snapshot.model[name]) for name in tensors)


def test_tensors_begin_where_a_gpu_writes_best(store: CheckpointStore) -> None:
    saved(store, 5)
    for kind in ("model", "optimizer"):
        content = Path(store.folder.path("checkpoint_00000005_a", f"{kind}-00000-of-00001.safetensors")).read_bytes()
        assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0


def test_model_only_never_opens_an_optimizer_file(store: CheckpointStore) -> None:
    snapshot = saved(store, 5)
    store.folder.fs.rm(store.folder.path("checkpoint_00000005_a", "optimizer-00000-of-00001.safetensors"))
    read = store.read(store.select(), model_only=True)
    assert not read.optimizer
    assert all(torch.equal(read.model[name], snapshot.model[name]) for name in snapshot.model)


def test_nothing_exists_before_it_is_announced(store: CheckpointStore) -> None:
    saved(store, 5)
    store.folder.fs.rm(store.folder.path("checkpoint_00000005_a", "state.json"))
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
    damage(Path(store.folder.path("checkpoint_00000008_a", file)))
    config = replace(tiny, **ARGS_OF_CONFIG)
    with caplog.at_level(logging.WARNING):
        state = restore_or_initialize(config, World(), store, NO_MEMORY, ARGS)
    assert state.iter_num == 4
    assert tensors_equal(capture(state), older)
    never_announced = (file, damage) == ("state.json", Path.unlink)
    assert never_announced or "checkpoint_00000008_a" in caplog.text


@pytest.mark.parametrize(
    ("version", "remedy"), [(99, "update this program"), (0, "read it with the program that wrote it")]
)
def test_a_checkpoint_of_another_format_is_not_guessed_at(
    store: CheckpointStore, version: int, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(store, 4)
    saved(store, 8)
    path = Path(store.folder.path("checkpoint_00000008_a", "state.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))
    with pytest.raises(CheckpointError, match=remedy):
        store.load("checkpoint_00000008_a")
    assert store.select("latest").iter_num == 4
    assert remedy in caplog.text


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    for iter_num, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        saved(store, iter_num, val_loss, keep=2)
    assert [checkpoint.iter_num for checkpoint in store.newest_first()] == [5, 4, 2]
    assert store.select("best").iter_num == 2
    assert store.select("latest").iter_num == 5


def test_pruning_removes_what_was_abandoned_but_not_what_may_be_being_written(store: CheckpointStore) -> None:
    saved(store, 4)
    for name in ("checkpoint_00000003_b", "checkpoint_00000004_0", "checkpoint_00000004_b", "checkpoint_00000009_b"):
        store.folder.fs.makedirs(store.folder.path(name))
    assert store.prune(keep=1) == ["checkpoint_00000004_0", "checkpoint_00000004_b", "checkpoint_00000003_b"]
    assert store.names() == ["checkpoint_00000009_b", "checkpoint_00000004_a"]


def test_pruning_keeps_what_could_not_be_read(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for iter_num in (1, 2, 3):
        saved(store, iter_num)
    read = store.folder.fs.cat_file

    def refuse(path: str) -> bytes:
        if "checkpoint_00000002_a" in path:
            raise OSError("the storage has hiccups")
        return bytes(read(path))

    monkeypatch.setattr(store.folder.fs, "cat_file", refuse)
    assert store.prune(keep=1) == ["checkpoint_00000001_a"]
    monkeypatch.undo()
    assert [checkpoint.iter_num for checkpoint in checkpoints_in(store.folder.out_dir).newest_first()] == [3, 2]


def test_a_failing_storage_leaves_the_older_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(store, 4)

    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files, "FileIO", refuse)
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
        owner = owners(replicate(state, world_size), world_size)
        load = [sum(state[name].nbytes for name in state if owner[name] == rank) for rank in range(world_size)]
        assert max(load) <= 1.1 * min(load)


# a local file

BLOCK = 4096
ROOM = 4 * BLOCK  # of the buffer, in these tests


@dataclass
class Writes:
    """What a file has been asked to write: its length, and whether that went past the page cache.

    answer: says what becomes of the n-th write: "short", an error number, or "" for nothing special.
    """

    answer: Callable[[int, bool], str | int] = lambda _n, _is_direct: ""
    seen: list[tuple[int, bool]] = field(default_factory=list)
    is_closed: bool = False


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Watch the local files that are written, and make the buffer small."""
    writes = Writes()

    class Watched(FileIO):
        def write(self, content: Any) -> int:
            is_direct = bool(fcntl.fcntl(self, fcntl.F_GETFL) & files._O_DIRECT)
            writes.seen.append((len(content), is_direct))
            answer = writes.answer(len(writes.seen), is_direct)
            if isinstance(answer, int):
                raise OSError(answer, os.strerror(answer))
            if answer == "short":
                content = bytes(content[:-100])  # what a disk would not take, if it was to go there directly
                fcntl.fcntl(self, fcntl.F_SETFL, 0)
                count = super().write(content)
                fcntl.fcntl(self, fcntl.F_SETFL, files._O_DIRECT)
                return count
            return super().write(content)

        def close(self) -> None:
            super().close()
            writes.is_closed = True

    monkeypatch.setattr(files, "FileIO", Watched)
    monkeypatch.setattr(files, "_PIECE_BYTES", ROOM)
    return writes


def written(path: Path, content: bytes, *lengths: int) -> FileRecord:
    """Write a file in pieces of these lengths and one of the rest."""

    def pieces() -> Iterator[memoryview]:
        start = 0
        for length in (*lengths, len(content)):
            yield memoryview(content)[start : start + length]
            start += length

    told: list[int] = []
    record = write_file(LocalFileSystem(), str(path), pieces(), told.append)
    assert sum(told) == len(content)
    assert path.read_bytes() == content
    assert record == FileRecord(len(content), xxhash.xxh3_128(content).hexdigest())
    return record


def takes_direct_writes(folder: Path) -> bool:
    with FileIO(str(folder / "probe"), "w") as file:
        return files._pass_cache(file, True)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, ROOM - 1, ROOM, ROOM + 1, 9 * ROOM + 777])
@pytest.mark.parametrize("lengths", [(), (200,), (200, ROOM, 1), (0, BLOCK, 3 * ROOM)])
def test_whole_blocks_pass_the_page_cache_whatever_the_sizes(
    tmp_path: Path, writes: Writes, size: int, lengths: tuple[int, ...]
) -> None:
    if not takes_direct_writes(tmp_path):
        pytest.skip(f"the file system of {tmp_path} knows no direct writes")
    written(tmp_path / "file", os.urandom(size), *lengths)
    direct = [count for count, is_direct in writes.seen if is_direct]
    through_cache = [count for count, is_direct in writes.seen if not is_direct]
    assert all(count % BLOCK == 0 for count in direct)
    assert len(through_cache) <= 1
    assert sum(through_cache) < ROOM
    assert bool(direct) or size < ROOM + 200
    assert writes.is_closed


def test_aligned_memory_is_written_as_it_lies(tmp_path: Path, writes: Writes) -> None:
    if not takes_direct_writes(tmp_path):
        pytest.skip(f"the file system of {tmp_path} knows no direct writes")
    memory = memoryview(mmap.mmap(-1, 9 * ROOM))
    write_file(LocalFileSystem(), str(tmp_path / "file"), [memory[: 5 * ROOM], memory[5 * ROOM : 7 * ROOM + 5]])
    assert writes.seen == [(5 * ROOM, True), (2 * ROOM, True), (5, False)]


REFUSALS: dict[str, Callable[[int, bool], str | int]] = {
    "at the first write": lambda _n, is_direct: errno.EINVAL if is_direct else "",
    "in the middle": lambda n, is_direct: errno.EINVAL if is_direct and n > 2 else "",
    "a write is cut short": lambda n, is_direct: "short" if is_direct and n == 2 else "",
}


@pytest.mark.parametrize("when", REFUSALS)
def test_a_disk_that_refuses_direct_writes_is_written_through_the_cache(
    tmp_path: Path, writes: Writes, when: str
) -> None:
    writes.answer = REFUSALS[when]
    written(tmp_path / "file", os.urandom(9 * ROOM + 777), 200, 5 * ROOM)
    assert not writes.seen[-1][1]


@pytest.mark.parametrize("why", ["file system", "no such flag"])
def test_where_there_are_no_direct_writes_the_cache_is_used(
    tmp_path: Path, writes: Writes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl_, asked = fcntl.fcntl, []

    def refuse(file: Any, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            asked.append(value)
            raise OSError(errno.EINVAL, "Invalid argument")
        return fcntl_(file, command, value)

    if why == "file system":
        monkeypatch.setattr(fcntl, "fcntl", refuse)
    else:
        monkeypatch.setattr(files, "_O_DIRECT", 0)
    written(tmp_path / "file", os.urandom(3 * ROOM + 7), 200, ROOM)
    assert writes.seen == [(200, False), (ROOM, False), (2 * ROOM + 7 - 200, False)]
    assert bool(asked) == (why == "file system")


def test_a_memory_file_system_takes_files_too(memory_dir: str, writes: Writes) -> None:
    written(Path(memory_dir, "file"), os.urandom(3 * ROOM + 7), 200)
    Path(memory_dir, "file").unlink()
    assert writes.seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_in_the_middle_of_a_file_is_told_and_the_file_closed(
    tmp_path: Path, writes: Writes, code: int
) -> None:
    writes.answer = lambda n, _is_direct: code if n == 3 else ""
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        written(tmp_path / "file", os.urandom(9 * ROOM), 200)
    assert caught.value.errno == code
    assert len(writes.seen) == 3
    assert writes.is_closed


def test_a_disk_that_is_full_only_in_the_end_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File servers may take everything into their cache, and say at fsync that there is no room."""

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space left"):
        written(tmp_path / "file", b"content")
