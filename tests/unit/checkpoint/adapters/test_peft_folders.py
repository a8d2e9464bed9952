"""Folders of peft's, written for it and taken from it: the logits are one, whoever computes them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, LoRAConfig
from model.lora import LAYERS
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt
from orchestrator.checkpoint.formats.sources import Kind, find_source
from orchestrator.checkpoint.formats.weights import look_at, read_merged, read_source
from orchestrator.checkpoint.snapshot import Adapters, Base, Snapshot
from orchestrator.commands.sample import SampleConfig, build, sample
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.errors import CheckpointError
from tests.support.adapters import save_adapters
from tests.support.bases import CHARS
from tests.support.commands import Say
from tests.support.states import random_state, save_run

# Transformers', of a property that peft asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11, "bias": True, "dropout": 0.0}
IDX = torch.arange(8).view(2, 4) % 11


@pytest.fixture
def base() -> Snapshot:
    return random_state(ARGS, iter_num=0)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDX, IDX)[0] if isinstance(model, GPT) else model.eval()(IDX).logits  # type: ignore[no-any-return]


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def gpt2(folder: Path, kind: str = "GPT2LMHeadModel") -> Any:
    return getattr(pytest.importorskip("transformers"), kind).from_pretrained(folder)


def save_with_peft(base_dir: Path, folder: Path, kind: str = "GPT2LMHeadModel", **settings: Any) -> Any:
    """Let peft make an adapter, with values that matter, and save it; return its model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(gpt2(base_dir, kind), peft.LoraConfig(fan_in_fan_out=True, **settings))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    model.save_pretrained(folder)
    return model


def plain(snapshot: Snapshot) -> GPT:
    return build(snapshot, snapshot.model.items())


# ours in peft


@pytest.mark.parametrize("targets", [("attn.c_attn",), LAYERS], ids=["c_attn", "all-linear"])
def test_peft_computes_what_we_compute(
    base: Snapshot, base_dir: Path, tmp_path: Path, say: Say, targets: tuple[str, ...]
) -> None:
    peft = pytest.importorskip("peft")
    lora = LoRAConfig(2, 5.0, targets, dropout=0.1)
    ours = logits(save_adapters(tmp_path / "run", base, lora, Base(str(base_dir))))
    words = f"--out_dir={tmp_path}/run"
    said = say("export", words, "--format=peft", f"--to={tmp_path}/peft")
    assert said == f"wrote checkpoint_00000007_local (iteration 7) to {tmp_path}/peft\n"
    model = peft.PeftModel.from_pretrained(gpt2(base_dir), tmp_path / "peft")
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.r, config.lora_dropout) == (str(base_dir), 2, 0.1)
    assert furthest(logits(model), ours) < 1e-5
    assert furthest(logits(gpt2(base_dir)), ours) > 0.1, "else this would show nothing"

    say("export", words, "--format=hf", f"--to={tmp_path}/merged")
    theirs, merged = model.merge_and_unload(), gpt2(tmp_path / "merged")
    assert furthest(logits(merged), ours) < 1e-5
    for name, tensor in theirs.state_dict().items():
        assert furthest(tensor, merged.state_dict()[name]) < 1e-5, name


def test_the_files_are_those_that_peft_writes(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    save_with_peft(base_dir, tmp_path / "theirs", r=2, lora_alpha=5, target_modules=["c_attn"], task_type="CAUSAL_LM")
    save_adapters(tmp_path / "run", base, LoRAConfig(2, 5.0), Base(str(base_dir)))
    say("export", f"--out_dir={tmp_path}/run", "--format=peft", f"--to={tmp_path}/ours")
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    assert ours.keys() <= theirs.keys()
    assert {key for key in ours if ours[key] != theirs[key]} == {"target_modules"}
    shapes = [
        {name: tensor.shape for name, tensor in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("theirs", "ours")
    ]
    assert shapes[0] == shapes[1]


def test_a_base_of_the_hub_has_its_owners_name(base: Snapshot, tmp_path: Path, say: Say) -> None:
    save_adapters(tmp_path / "run", base, LoRAConfig(2), Base("gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"))
    say("export", f"--out_dir={tmp_path}/run", "--format=peft", f"--to={tmp_path}/peft")
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "openai-community/gpt2-xl"
    assert content["revision"] == "15ea56dee5df4983c59b2538573817e1667135e2"


def test_a_base_that_has_moved_is_named_where_it_is(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    save_adapters(tmp_path / "run", base, LoRAConfig(2), Base(str(base_dir)))
    base_dir.rename(moved := tmp_path / "moved")
    words = f"--out_dir={tmp_path}/run", "--format=peft", f"--to={tmp_path}/peft"
    said = say("export", *words, f"--lora_base={tmp_path}/nowhere", code=2)
    assert "the base model of these adapters is missing" in said
    say("export", *words, f"--lora_base={moved}")
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == (str(moved), None)


# peft's here


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
        {"target_modules": r".*\.(attn|mlp)\.c_proj"},
        {},
    ],
    ids=["c_attn", "all-linear", "regex", "default"],
)
def test_adapters_that_peft_made_compute_the_same(base_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = save_with_peft(base_dir, tmp_path / "peft", task_type="CAUSAL_LM", **settings)
    source = find_source(SampleConfig(str(tmp_path / "peft")))
    assert source.kind is Kind.ADAPTER
    merged = read_merged(source)
    assert merged.adapters is None
    assert furthest(logits(plain(merged)), logits(theirs)) < 1e-5


def test_adapters_of_a_bare_transformer(base_dir: Path, tmp_path: Path) -> None:
    theirs = save_with_peft(base_dir, tmp_path / "peft", "GPT2Model", target_modules=["c_attn"])
    assert all(".model.h." in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    merged = plain(read_merged(find_source(SampleConfig(str(tmp_path / "peft")))))
    with torch.no_grad():
        hidden = theirs.eval()(IDX).last_hidden_state
        assert furthest(logits(merged), hidden @ merged.transformer.wte.weight.T) < 1e-5


@pytest.fixture
def folder(base_dir: Path, base: Snapshot, tmp_path: Path, say: Say) -> Path:
    """A folder of peft's with adapters beside the base."""
    save_adapters(tmp_path / "run", base, LoRAConfig(2, 5.0, dropout=0.25), Base(str(base_dir)))
    say("export", f"--out_dir={tmp_path}/run", "--format=peft", f"--to={tmp_path}/peft")
    return tmp_path / "peft"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_folder_is_read_as_adapters(folder: Path, base_dir: Path, tmp_path: Path) -> None:
    trained = read_source(find_source(SampleConfig(out_dir=str(tmp_path / "run"))))
    source = find_source(SampleConfig(str(folder)))
    found, outlined = read_source(source), look_at(source)
    for each in (found, outlined):
        assert each.adapters == Adapters(LoRAConfig(2, 5.0), Base(str(base_dir)))
        assert each.model_args == {**ARGS, "activation": "gelu"}
        assert (each.iter_num, each.optimizer, each.param_groups) == (0, {}, ())
    assert found.model.keys() == outlined.model.keys() == trained.model.keys()
    assert all(torch.equal(found.model[name], tensor) for name, tensor in trained.model.items())


def test_the_base_is_noted_as_it_is_now(
    folder: Path, base: Snapshot, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that begins with the folder may go on from elsewhere, and later."""
    monkeypatch.chdir(tmp_path)
    edit(folder, base_model_name_or_path="base")
    assert find_and_look(folder).adapters == Adapters(LoRAConfig(2, 5.0), Base(str(base_dir)))
    name = save_run(tmp_path / "whole", base)
    edit(folder, base_model_name_or_path="whole")
    assert find_and_look(folder).adapters == Adapters(LoRAConfig(2, 5.0), Base(str(tmp_path / "whole"), name))
    moved = look_at(find_source(SampleConfig(str(folder), lora_base=str(base_dir))))
    assert moved.adapters == Adapters(LoRAConfig(2, 5.0), Base("whole"))


@pytest.mark.parametrize("by", ["init_from", "out_dir", "url"])
def test_every_command_takes_a_folder(folder: Path, tmp_path: Path, say: Say, by: str) -> None:
    place = str(folder)
    if by == "url":
        place = "memory://adapters/peft"
        fsspec.filesystem("memory").put(f"{folder}/", "/adapters/peft/", recursive=True)
    words = f"--{'out_dir' if by == 'out_dir' else 'init_from'}={place}"
    out = io.StringIO()
    config = SampleConfig(start="abc", num_samples=1, max_new_tokens=2, device="cpu")
    sample(replace(config, **{words[2:].partition("=")[0]: place}), out)
    assert out.getvalue().startswith("abc")
    trained = read_merged(find_source(SampleConfig(out_dir=str(tmp_path / "run"))))
    say("export", words, f"--to={tmp_path}/x.pt")
    assert furthest(logits(plain(read_nanogpt(tmp_path / "x.pt"))), logits(plain(trained))) < 1e-5
    say("export", words, "--format=hf", f"--to={tmp_path}/merged")
    assert (tmp_path / "merged" / "char_tokenizer.json").exists(), "of the base model"
    say("export", words, "--format=peft", f"--to={tmp_path}/again")
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again == json.loads((folder / "adapter_config.json").read_text())
    assert again["lora_dropout"] == 0.25
    told = say("inspect", words, "--verify")
    assert f"{place}: a peft adapter" in told
    assert "LoRA of rank 2, alpha 5, on attn.c_attn" in told
    assert "nothing tells its checksum, all finite" in told
    flags = "--lora_rank=2 --lora_alpha=5 --lora_targets=attn.c_attn --lora_dropout=0.25"
    assert (f"train {words} {flags} --out_dir=out/tuned" in told) == (by != "out_dir")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_float32(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda found: {name: tensor.to(dtype) for name, tensor in found.items()})
    found = read_source(find_source(SampleConfig(str(folder))))
    assert {tensor.dtype for tensor in found.model.values()} == {torch.float32}


def test_a_pickle_of_tensors_alone_is_taken(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    trained = read_source(find_source(SampleConfig(out_dir=str(tmp_path / "run"))))
    found = read_source(find_source(SampleConfig(str(folder))))
    assert all(torch.equal(found.model[name], tensor) for name, tensor in trained.model.items())
    torch.save({"x": CharTokenizer(CHARS)}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="it holds more than tensors"):
        find_and_look(folder)


def find_and_look(folder: Path) -> Snapshot:
    return look_at(find_source(SampleConfig(str(folder))))


def lose_the_last_block(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if ".h.1." not in name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: edit(folder, use_rslora=True), "it has use_rslora=True, which our adapters do not compute"),
        (lambda folder: edit(folder, r=4), r"lora_A is \(2, 8\) instead of \(4, 8\)"),
        (
            lambda folder: edit_tensors(folder, lose_the_last_block),
            r"missing transformer\.h\.1\.attn\.c_attn\.lora_A.*every block",
        ),
        (lambda folder: edit(folder, base_model_name_or_path=None), "nothing tells the base model of these adapters"),
        (lambda folder: edit(folder, base_model_name_or_path="distilgpt2"), "missing: init_from=distilgpt2 holds no"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"adapter_config\.json: Expecting"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            r"none of adapter_model\.safetensors, adapter",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 9), "it is cut off"),
        (
            lambda folder: edit_tensors(folder, lambda found: {n: x.to(torch.int8) for n, x in found.items()}),
            "is int8, no floating-point numbers",
        ),
        (
            lambda folder: edit_tensors(folder, lambda found: {n: x * float("nan") for n, x in found.items()}),
            "values that are not finite",
        ),
    ],
    ids=["rslora", "rank", "blocks", "nameless", "elsewhere", "config", "empty", "cut", "int8", "nan"],
)
def test_what_is_wrong_is_told(folder: Path, change: Callable[[Path], None], told: str) -> None:
    find_and_look(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=told):
        find_and_look(folder)


def test_a_whole_model_beside_its_old_adapter_is_that_model(folder: Path, base_dir: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((base_dir / name).read_bytes())
    assert find_source(SampleConfig(str(folder))).kind is Kind.HUGGINGFACE
    (folder / "model.safetensors").unlink()
    assert find_source(SampleConfig(str(folder))).kind is Kind.ADAPTER


@pytest.mark.parametrize("command", ["sample", "export", "inspect"])
def test_one_file_of_the_folder_is_not_the_folder(folder: Path, say: Say, command: str) -> None:
    more = ["--to=x"] if command == "export" else []
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        said = say(command, *more, f"--init_from={folder}/{name}", code=2)
        assert f"give its folder, {folder}, with adapter_config.json in it" in said
