"""Export and import a tensor at a time: how much memory they take, and that nothing is delivered of a damaged state."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import parameter_shapes, read_nanogpt, write_nanogpt
from orchestrator.checkpoint.formats.progress import Progress
from orchestrator.checkpoint.formats.stream import outline, stream
from orchestrator.checkpoint.formats.torch_file import TorchFile
from orchestrator.checkpoint.restore.init_from import read_initial_state
from orchestrator.checkpoint.snapshot import Snapshot, describe, tensors_equal
from orchestrator.checkpoint.store import FORMAT_VERSION, Checkpoint, CheckpointStore
from orchestrator.checkpoint.tensor_file import tensor_pieces, write_file
from orchestrator.commands.export import ExportConfig, export
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError, DamagedError
from tests.support.runs import checkpoints_in
from tests.support.states import SMALL, random_state

LARGE = {**SMALL, "n_layer": 4, "n_embd": 512, "block_size": 512, "vocab_size": 4096}  # 60 MB, 180 with the moments


def commit(store: CheckpointStore, snapshot: Snapshot) -> Checkpoint:
    """Write a checkpoint as one rank does, and announce it."""
    name = f"checkpoint_{snapshot.iter_num:08d}_a"
    store.folder.fs.makedirs(store.folder.path(name))
    state = {"format_version": FORMAT_VERSION, **describe(snapshot), "saved_at_s": 0.0, "files": {}, "tensors": {}}
    for kind, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
        file = f"{kind}-00000-of-00001.safetensors"
        record = write_file(store.folder.fs, store.folder.path(name, file), tensor_pieces(tensors))
        state["files"][file] = asdict(record)
        for key, tensor in tensors.items():
            state["tensors"][key] = {"file": file, "shape": list(tensor.shape), "dtype": "float32"}
    assert store.commit(name, state, "a")
    return Checkpoint(name, state)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return checkpoints_in(str(tmp_path / "run"))


# memory

# Does WORK to a small model, so that everything is imported, then to the large one; prints what that took on top.
MEASURED = """
import sys
from orchestrator.checkpoint.restore.init_from import read_initial_state
from orchestrator.config import TrainConfig
from orchestrator.commands.export import ExportConfig, export
from model import GPT

def peak_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def work(folder):
    return WORK

work(sys.argv[1])
before_bytes = peak_bytes()
kept = work(sys.argv[2])
print(peak_bytes() - before_bytes)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders, with a small and a large model: a run, and what its export in each format gives."""
    made = [tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("large")]
    for folder, args in zip(made, (SMALL, LARGE), strict=True):
        commit(checkpoints_in(str(folder / "run")), random_state(args))
        export(ExportConfig(str(folder / "run"), "nanogpt", to=str(folder / "ckpt.pt")))
        export(ExportConfig(str(folder / "run"), "hf", to=str(folder / "hf")))
    return made


OUT = "export(ExportConfig(f'{folder}/run'"
FROM, START = "export(ExportConfig(init_from=f'{folder}", "read_initial_state(TrainConfig(init_from=f'{folder}"


# No more than 1.2 times the largest file is promised. A tensor at a time takes a tenth of it, or what the result takes.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("work", "file", "limit"),
    [
        ("export(ExportConfig(f'{folder}/run', to=f'{folder}/again.pt'))", "again.pt", 0.5),
        pytest.param(f"{OUT}, 'hf', to=f'{{folder}}/again'))", "again/model.safetensors", 0.5, marks=pytest.mark.slow),
        # of a ckpt.pt the weights, a third of it, are mapped while they are read
        pytest.param(f"{FROM}/ckpt.pt', format='hf', to=f'{{folder}}/hf2'))", "ckpt.pt", 0.5, marks=pytest.mark.slow),
        pytest.param(f"{FROM}/hf', to=f'{{folder}}/x.pt'))", "hf/model.safetensors", 0.5, marks=pytest.mark.slow),
        pytest.param(f"{START}/run', block_size=4))", "ckpt.pt", 0.5, marks=pytest.mark.slow),
        ("read_initial_state(TrainConfig(init_from=f'{folder}/ckpt.pt', block_size=4))", "ckpt.pt", 0.5),
        pytest.param(f"{START}/hf', block_size=4))", "hf/model.safetensors", 0.5, marks=pytest.mark.slow),
        ("GPT.from_pretrained(f'{folder}/hf')", "hf/model.safetensors", 1.2),
    ],
)
def test_peak_memory(folders: list[Path], work: str, file: str, limit: float) -> None:
    code = MEASURED.replace("WORK", work)
    process = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-1]) < limit * (folders[1] / file).stat().st_size


# what is written of a stream


def test_export_gives_the_stored_bits(store: CheckpointStore, tmp_path: Path) -> None:
    snapshot = random_state(SMALL)
    commit(store, snapshot)
    export(ExportConfig(store.folder.out_dir, "nanogpt", to=str(tmp_path / "ckpt.pt")))
    export(ExportConfig(store.folder.out_dir, "hf", to=str(tmp_path / "hf")))
    assert tensors_equal(read_nanogpt(tmp_path / "ckpt.pt"), snapshot)
    tensors = read_initial_state(TrainConfig(init_from=str(tmp_path / "hf"), block_size=4)).model
    assert tensors_equal(replace(snapshot, model=tensors, optimizer={}), replace(snapshot, optimizer={}))


def test_a_model_without_biases_is_exported_with_zeros(tmp_path: Path) -> None:
    snapshot = random_state({**SMALL, "bias": False})
    write_huggingface(snapshot, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == len(parameter_shapes(SMALL))
        biases = [file.get_tensor(name) for name in file.keys() if name.endswith(".bias")]  # noqa: SIM118
    assert len(biases) == len(parameter_shapes(SMALL)) - len(snapshot.model)
    assert not any(bias.any() for bias in biases)


def test_optimizer_files_are_not_touched_for_a_model(store: CheckpointStore, tmp_path: Path) -> None:
    checkpoint = commit(store, random_state(SMALL))
    Path(store.folder.path(checkpoint.name, "optimizer-00000-of-00001.safetensors")).unlink()
    assert outline(checkpoint, model_only=True).optimizer == {}
    export(ExportConfig(store.folder.out_dir, "hf", to=str(tmp_path / "hf")))
    with pytest.raises(CheckpointError, match=r"optimizer-00000-of-00001\.safetensors is missing"):
        export(ExportConfig(store.folder.out_dir, "nanogpt", to=str(tmp_path / "ckpt.pt")))


@pytest.mark.parametrize("format", ["nanogpt", "hf"])
def test_nothing_is_delivered_of_a_damaged_checkpoint(store: CheckpointStore, tmp_path: Path, format: str) -> None:
    checkpoint = commit(store, random_state(SMALL))
    path = Path(store.folder.path(checkpoint.name, "model-00000-of-00001.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last tensor: all others were written by then
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        export(ExportConfig(store.folder.out_dir, format, to=str(tmp_path / "there" / "export")))
    assert not [path for path in (tmp_path / "there").rglob("*") if path.is_file()]

    older = random_state(SMALL, iter_num=4)
    commit(store, older)
    again = ExportConfig(store.folder.out_dir, format, to=str(tmp_path / "export"), overwrite=True)
    assert "(iteration 4)" in export(again)
    if format == "nanogpt":
        assert tensors_equal(read_nanogpt(tmp_path / "export"), older)


def test_a_full_disk_is_not_taken_for_a_damaged_checkpoint(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    commit(store, random_state(SMALL))
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError, match=r"cannot be written: OSError.*No space left"):
        export(ExportConfig(store.folder.out_dir, "nanogpt", to=str(tmp_path / "ckpt.pt")))
    assert not store.damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.wpe.weight"), r"its transformer\.wpe\.weight is not the one"),
        (
            lambda tensors: tensors["transformer.wpe.weight"].update(shape=[8, 4]),
            r"its transformer\.wpe\.weight is not",
        ),
        (lambda tensors: tensors["step"].update(dtype="float16"), "its step is not the one"),
        (lambda tensors: tensors.update(extra=tensors["step"]), "is damaged: no file of it has extra"),
    ],
)
def test_files_must_hold_what_the_index_says(store: CheckpointStore, change: object, message: str) -> None:
    checkpoint = commit(store, random_state(SMALL))
    change(checkpoint.state["tensors"])  # type: ignore[operator]
    with pytest.raises(DamagedError, match=message):
        list(stream(store, checkpoint))


# a file of torch.save's


def test_blanks_are_filled_in_any_order(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "scalar": torch.tensor(3.0),
        "half": torch.randn(5, 3).bfloat16(),
        "long": torch.arange(7),
        "matrix": torch.randn(9, 4),
    }
    file = TorchFile()
    blanks = {name: file.blank(name, tensor) for name, tensor in tensors.items()}
    again = file.blank("scalar", tensors["scalar"])
    path = tmp_path / "file.pt"
    transposed = {**tensors, "matrix": tensors["matrix"].t().contiguous().t()}  # not contiguous
    file.save({"n": 3, "a": blanks, "tied": blanks["matrix"], "again": again}, path, reversed(transposed.items()), "it")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        content = torch.load(path, weights_only=True, mmap=mmap)
        assert content["n"] == 3
        assert all(torch.equal(content["a"][name], tensors[name]) for name in tensors)
        assert {name: x.dtype for name, x in content["a"].items()} == {name: x.dtype for name, x in tensors.items()}
        assert content["tied"].data_ptr() == content["a"]["matrix"].data_ptr()
        assert content["again"] == 3
        assert content["again"].data_ptr() != content["a"]["scalar"].data_ptr()


def test_the_file_is_torch_saves_to_the_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(i, 100) for i in range(1, 40)}
    file = TorchFile()
    file.save({name: file.blank(name, x) for name, x in tensors.items()}, tmp_path / "ours.pt", tensors.items(), "it")
    torch.save(tensors, tmp_path / "theirs.pt")
    assert contents(tmp_path / "ours.pt") == contents(tmp_path / "theirs.pt")


def contents(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return place, checksum and bytes of a zip file's records; PyTorch derives the id of a file from its name."""
    with zipfile.ZipFile(path) as archive:
        return {
            info.filename.partition("/")[2]: (info.file_size, info.CRC, archive.read(info))
            for info in archive.infolist()
            if not info.filename.endswith("serialization_id")
        }


# what is read stays mapped


def test_tensors_outlive_a_file_that_was_fetched_or_deleted(tmp_path: Path) -> None:
    snapshot = random_state(SMALL)
    write_nanogpt(snapshot, tmp_path / "ckpt.pt")
    read = read_initial_state(TrainConfig(init_from=str(tmp_path / "ckpt.pt"), block_size=4))
    (tmp_path / "ckpt.pt").unlink()
    assert tensors_equal(read, snapshot)
    write_huggingface(snapshot, "memory://streaming/hf")
    tensors = read_initial_state(TrainConfig(init_from="memory://streaming/hf", block_size=4)).model
    assert all(torch.equal(tensors[name], snapshot.model[name]) for name in snapshot.model)


def test_shorter_positions_are_copied_out_of_the_file(tmp_path: Path) -> None:
    snapshot = random_state(SMALL)
    write_nanogpt(snapshot, tmp_path / "ckpt.pt")
    read = read_initial_state(TrainConfig(init_from=str(tmp_path / "ckpt.pt"), block_size=3))
    for tensors, name in ((read.model, "transformer.wpe.weight"), (read.optimizer, "exp_avg.transformer.wpe.weight")):
        assert tensors[name].shape == (3, 8)
        assert tensors[name].untyped_storage().nbytes() == 3 * 8 * 4


# progress


def test_long_work_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = iter([0.0, 1.0, 3.5, 3.5, 4.0, 9.0, 9.0])
    progress = Progress("writing ckpt.pt", 4 * 10**9, clock=lambda: next(now_s))
    for _ in range(4):
        progress.add(10**9)
    assert caplog.messages == ["writing ckpt.pt: 2.00 of 4.00 GB", "writing ckpt.pt: 4.00 of 4.00 GB"]


def test_small_work_is_quiet(store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    commit(store, random_state(SMALL))
    export(ExportConfig(store.folder.out_dir, "nanogpt", to=str(tmp_path / "ckpt.pt")))
    read_nanogpt(tmp_path / "ckpt.pt")
    assert not [message for message in caplog.messages if re.search(r"\d GB", message)]
