"""Models between a run, a ckpt.pt and a Hugging Face folder, without training: the same words, the same logits."""

from __future__ import annotations

import io
import json
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTConfig
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import HEAD, read_nanogpt, write_nanogpt
from orchestrator.checkpoint.formats.sources import Kind, find_source
from orchestrator.checkpoint.formats.weights import read_source, using
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.commands.export import ExportConfig, export
from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.commands.sample import SampleConfig, sample
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.errors import CheckpointError, ConfigError, UserError
from tests.support.commands import Say
from tests.support.states import SMALL, random_state, save_run

IDX = torch.arange(8).view(2, 4) % 11
CHARS = "abcdefghijk"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(IDX) if "transformers" in type(model).__module__ else model.eval()(IDX, IDX)[0]
    return found if isinstance(found, Tensor) else found.logits


def ours(snapshot: Snapshot) -> GPT:
    model = GPT(GPTConfig(**{**snapshot.model_args, "dropout": 0.0}))
    model.load_state_dict({**snapshot.model, HEAD: snapshot.model["transformer.wte.weight"]})
    return model


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


@pytest.fixture
def state() -> Snapshot:
    return replace(random_state(SMALL), config={"tokenizer": CharTokenizer(CHARS).to_json()})


@pytest.fixture
def places(state: Snapshot, tmp_path: Path) -> dict[str, str]:
    """The same state as a run, a ckpt.pt, a folder with that, and a Hugging Face folder."""
    save_run(tmp_path / "run", state)
    write_nanogpt(state, tmp_path / "nanogpt" / "ckpt.pt")
    write_huggingface(state, tmp_path / "hf", CharTokenizer(CHARS))
    return {"run": f"{tmp_path}/run", "ckpt.pt": f"{tmp_path}/nanogpt/ckpt.pt", "hf": f"{tmp_path}/hf"}


# the words


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "hf"])
@pytest.mark.parametrize("by", ["init_from", "out_dir", "url"])
def test_every_command_finds_the_same(places: dict[str, str], say: Say, tmp_path: Path, kind: str, by: str) -> None:
    place = places[kind]
    if by == "url":
        place = f"memory://interchange-{kind}" + ("/ckpt.pt" if kind == "ckpt.pt" else "")
        copy(places[kind], place)
    folder = place.removesuffix("/ckpt.pt") if by == "out_dir" else place
    words = [f"--out_dir={folder}"] if by == "out_dir" else [f"--init_from={place}"]
    assert "abc" in say("sample", *words, "--start=abc", "--num_samples=1", "--max_new_tokens=2", "--device=cpu")
    assert say("export", *words, f"--to={tmp_path}/out.pt").startswith("wrote ")
    assert say("export", *words, "--format=hf", f"--to={tmp_path}/out").endswith(f"to {tmp_path}/out\n")
    told = say("inspect", *words, "--verify")
    assert ("checkpoint(s)" in told) == (kind == "run")
    if kind != "run":
        assert "2 layers, 2 heads, width 8, 4 positions, vocab_size=11" in told
        assert "11 characters" in told
        assert "all finite" in told


def copy(source: str, url: str) -> None:
    memory = fsspec.filesystem("memory")
    files = [Path(source)] if Path(source).is_file() else [path for path in Path(source).rglob("*") if path.is_file()]
    for path in files:
        name = "" if Path(source).is_file() else f"/{path.relative_to(source)}"
        memory.pipe_file(f"{url.removeprefix('memory:/')}{name}", path.read_bytes())


def test_a_checkpoint_of_a_run_is_a_source_too(places: dict[str, str], say: Say, tmp_path: Path) -> None:
    (checkpoint,) = Path(places["run"]).glob("checkpoint_*")
    words = f"--init_from={checkpoint}"
    assert f"wrote {checkpoint.name} (iteration 5)" in say("export", words, f"--to={tmp_path}/out.pt")
    assert checkpoint.name in say("inspect", words)
    assert "is one checkpoint, but checkpoint=best" in say("export", words, "--checkpoint=best", "--to=x", code=2)
    assert "that is a file of a checkpoint: give its folder" in say("sample", f"{words}/state.json", code=2)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"],
)
@pytest.mark.parametrize("command", ["sample", "export", "inspect", "train"])
def test_a_weights_file_is_not_its_folder(say: Say, tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    more = ["--to=x"] if command == "export" else [f"--out_dir={tmp_path}/out"]
    said = say(command, *more, f"--init_from={tmp_path}/{name}", code=2)
    assert f"that is a weights file: give its folder, {tmp_path}, with config.json in it" in said
    assert "that is a weights file" in say(command, *more, f"--init_from=memory://nowhere/{name}", code=2)


@pytest.mark.parametrize("command", ["sample", "export", "inspect", "train"])
def test_a_folder_with_nothing_in_it(say: Say, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    more = ["--to=x"] if command == "export" else [f"--out_dir={tmp_path}/out"]
    said = say(command, *more, f"--init_from={tmp_path}/empty", code=2)
    assert "empty holds no run, no ckpt.pt and no Hugging Face folder with a config.json" in said
    if command != "train":
        assert "init_from='nowhere' is neither resume, gpt2" in say(command, *more, "--init_from=nowhere", code=2)


def test_of_several_things_in_a_folder_a_run_is_meant_then_a_huggingface_model(
    places: dict[str, str], tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(places["hf"], both)
    shutil.copy(places["ckpt.pt"], both)
    assert find_source(SampleConfig(str(both))).kind is Kind.HUGGINGFACE
    shutil.copytree(next(Path(places["run"]).glob("checkpoint_*")), both / "checkpoint_00000005_x")
    assert find_source(SampleConfig(out_dir=str(both))).kind is Kind.RUN


# the same model


def test_nanogpt_to_hugging_face_and_back(places: dict[str, str], state: Snapshot, tmp_path: Path) -> None:
    export(ExportConfig(init_from=places["ckpt.pt"], format="hf", to=f"{tmp_path}/there"))
    torch.testing.assert_close(logits(theirs(tmp_path / "there")), logits(ours(state)), atol=1e-4, rtol=1e-4)
    export(ExportConfig(init_from=f"{tmp_path}/there", to=f"{tmp_path}/back.pt"))
    back = read_nanogpt(tmp_path / "back.pt")
    assert torch.equal(logits(ours(back)), logits(ours(state)))
    assert back.model_args == {**state.model_args, "dropout": 0.0}
    assert back.config["tokenizer"] == CharTokenizer(CHARS).to_json()
    assert (back.iter_num, back.optimizer) == (0, {})


def test_hugging_face_to_nanogpt_and_back_keeps_the_activation(state: Snapshot, tmp_path: Path) -> None:
    state.model_args["activation"] = "gelu_tanh"
    write_huggingface(state, tmp_path / "hf")
    export(ExportConfig(init_from=f"{tmp_path}/hf", to=f"{tmp_path}/x.pt"))
    export(ExportConfig(init_from=f"{tmp_path}/x.pt", format="hf", to=f"{tmp_path}/back"))
    assert torch.equal(logits(theirs(tmp_path / "back")), logits(theirs(tmp_path / "hf")))


def test_a_ckpt_is_written_again_with_its_optimizer(places: dict[str, str], state: Snapshot, tmp_path: Path) -> None:
    export(ExportConfig(init_from=places["ckpt.pt"], to=f"{tmp_path}/again.pt"))
    again = read_nanogpt(tmp_path / "again.pt")
    assert tensors_equal(again, state)
    assert (again.iter_num, again.best_val_loss) == (5, 2.0)


def test_half_precision_becomes_float32(state: Snapshot, tmp_path: Path) -> None:
    write_huggingface(state, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "hf" / "model.safetensors")
    export(ExportConfig(init_from=f"{tmp_path}/hf", to=f"{tmp_path}/x.pt"))
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["model"] = {name: tensor.bfloat16() for name, tensor in content["model"].items()}
    torch.save(content, tmp_path / "half.pt")
    export(ExportConfig(init_from=f"{tmp_path}/half.pt", format="hf", to=f"{tmp_path}/back"))
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    assert all(torch.equal(back[name], tensor.half().bfloat16().float()) for name, tensor in tensors.items())
    assert "stored as      bfloat16" in inspect(InspectConfig(init_from=f"{tmp_path}/half.pt"))


def test_a_folders_own_tokenizer_goes_along_as_it_is(places: dict[str, str], tmp_path: Path) -> None:
    own = {"tokenizer.json": b'{"version": "1.0"}', "special_tokens_map.json": b"{}", "merges.txt": b"#version: 0.2\n"}
    for name, content in {**own, "generation_config.json": b'{"eos_token_id": 3}'}.items():
        Path(places["hf"], name).write_bytes(content)
    export(ExportConfig(init_from=places["hf"], format="hf", to=f"{tmp_path}/again"))
    for name in (*own, "generation_config.json", "char_tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == Path(places["hf"], name).read_bytes()
    theirs_config, config = (
        json.loads(Path(folder, "config.json").read_text()) for folder in (places["hf"], tmp_path / "again")
    )
    assert config == theirs_config


@pytest.mark.parametrize(
    ("source", "to", "format"),
    [
        ("ckpt.pt", "nanogpt/ckpt.pt", "nanogpt"),
        ("ckpt.pt", "nanogpt/../nanogpt/ckpt.pt", "nanogpt"),
        ("hf", "hf", "hf"),
        ("hf", "hf/model.safetensors", "nanogpt"),
        ("run", "run", "hf"),
        ("run", "run/checkpoint_00000005_local/state.json", "nanogpt"),
    ],
)
def test_nothing_is_written_over_its_own_source(
    places: dict[str, str], tmp_path: Path, source: str, to: str, format: str
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = ExportConfig(init_from=places[source], format=format, to=f"{tmp_path}/{to}", overwrite=True)
    with pytest.raises(ConfigError, match=r"lies in what is exported, .*: give a place of its own"):
        export(config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_is_no_file_to_write(places: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"run is a folder: give the file to write, .*/run/ckpt\.pt"):
        export(ExportConfig(out_dir=places["run"], to=places["run"], overwrite=True))


def test_a_ckpt_may_lie_in_the_runs_folder(places: dict[str, str], state: Snapshot) -> None:
    export(ExportConfig(out_dir=places["run"], to=f"{places['run']}/ckpt.pt"))
    assert tensors_equal(read_nanogpt(f"{places['run']}/ckpt.pt"), state)
    assert find_source(SampleConfig(out_dir=places["run"])).kind is Kind.RUN


def test_a_run_is_mapped_and_verified(places: dict[str, str], state: Snapshot) -> None:
    source = find_source(SampleConfig(places["run"]))
    assert tensors_equal(read_source(source), state)
    assert read_source(source, model_only=True).optimizer == {}
    (path,) = Path(places["run"]).glob("checkpoint_*/model-*")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint: .*its checksum differs"):
        read_source(source)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "char_tokenizer.json", "ckpt.pt", "pytorch_model.bin"]
)
def test_damage_ends_in_one_line(places: dict[str, str], name: str) -> None:
    """Whatever bytes are wrong, a user's error is all that comes of it."""
    folder, draw = Path(places["hf"]), random.Random(name)
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    path = Path(places["ckpt.pt"]) if name == "ckpt.pt" else folder / name
    whole = path.read_bytes()
    refused = 0
    for _ in range(12):
        content, at = bytearray(whole), draw.randrange(min(len(whole), 3000))
        content[at] ^= 1 << draw.randrange(8)
        content[at + 1 : at + 1 + draw.choice([0, 0, 40])] = b""
        path.write_bytes(content[: draw.choice([len(whole), len(whole), at])])
        try:
            sample(SampleConfig(str(path if name == "ckpt.pt" else folder), "", "a", 1, 3, device="cpu"), io.StringIO())
        except UserError:
            refused += 1
    assert refused > 3


# inspect


def test_what_inspect_tells_of_a_ckpt(places: dict[str, str], say: Say, state: Snapshot) -> None:
    lines = say("inspect", f"--init_from={places['ckpt.pt']}").splitlines()
    count = sum(tensor.numel() for tensor in state.model.values())
    assert lines[0] == f"{places['ckpt.pt']}: nanoGPT's ckpt.pt"
    told = {line[2:15].strip(): line[15:].strip() for line in lines[1:8]}
    assert (told["iteration"], told["best val loss"]) == ("5", "2.0000")
    assert told["parameters"] == f"{count:,} ({count / 1e6:.2f}M)"
    assert (told["stored as"], told["tokenizer"], told["optimizer"]) == ("float32", "11 characters", "AdamW's moments")
    assert any("sample --init_from=" in line for line in lines)


def test_inspect_tells_of_a_foreign_optimizer_and_goes_on(places: dict[str, str]) -> None:
    content = torch.load(places["ckpt.pt"], weights_only=True)
    content["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": [0]}]}
    torch.save(content, places["ckpt.pt"])
    assert "its groups have no betas, but lr, momentum" in inspect(InspectConfig(init_from=places["ckpt.pt"]))


def test_a_model_of_a_megabyte_goes_a_tensor_at_a_time(places: dict[str, str]) -> None:
    alive: list[int] = []

    def use(weights: Any) -> None:
        seen: list[Any] = []
        for _, tensor in weights.tensors:
            seen.append(weakref.ref(tensor))
            del tensor
            alive.append(sum(ref() is not None for ref in seen))

    using(find_source(SampleConfig(places["hf"])), use)
    assert max(alive) <= 2
