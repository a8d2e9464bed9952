"""Hugging Face folders that people really have: other heads, wrappers, half copies, adapters, other models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTConfig, PretrainedError, huggingface_config, open_pretrained, parameter_shapes, to_huggingface

SIZES = {"block_size": 12, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16, "activation": "gelu_tanh"}
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
Edit = Callable[[dict[str, Tensor]], Any]


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES))


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(model.config)))
    save_file(to_huggingface(model.state_dict()), tmp_path / "model.safetensors")
    return tmp_path


def edit(folder: Path, change: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def assert_is(folder: Path | str, model: GPT) -> None:
    read = GPT.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    with open_pretrained(str(folder), parameter_shapes) as found:
        streamed = dict(found.tensors())
    assert streamed.keys() == model.state_dict().keys() - {HEAD}
    assert all(torch.equal(tensor, read[name]) for name, tensor in streamed.items())


def refusal(folder: Path | str) -> str:
    with pytest.raises(PretrainedError) as caught, open_pretrained(str(folder), parameter_shapes):
        pass
    return str(caught.value)


# what is taken


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module."])
def test_wrappers_prefixes_are_taken_off(folder: Path, model: GPT, prefix: str) -> None:
    edit(folder, lambda x: [x.update({prefix + name: x.pop(name)}) for name in list(x)])
    assert_is(folder, model)


def test_the_tied_weight_may_have_the_heads_name_only(folder: Path, model: GPT) -> None:
    edit(folder, lambda x: x.update({HEAD: x.pop(EMBEDDING)}))
    assert_is(folder, model)
    edit(folder, lambda x: x.update({EMBEDDING: x[HEAD].clone()}))
    assert_is(folder, model)


@pytest.mark.parametrize(
    "head", ["score.weight", "classifier.bias", "v_head.summary.weight", "multiple_choice_head.summary.weight"]
)
def test_another_head_is_left_out(folder: Path, model: GPT, head: str) -> None:
    edit(folder, lambda x: x.update({head: torch.zeros(2, 16)}))
    assert_is(folder, model)
    with open_pretrained(str(folder), parameter_shapes) as found:
        assert found.left_out == [head]


def test_a_config_without_model_type_is_known_by_gpt2s_words(folder: Path, model: GPT) -> None:
    configure(folder, model_type=...)
    assert_is(folder, model)


# what is refused, by headers alone


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 50257}, "transformer.wte.weight is (31, 16) instead of (50257, 16)"),
        ({"n_positions": 1024}, "transformer.wpe.weight is (12, 16) instead of (1024, 16)"),
        ({"n_layer": 3}, "missing transformer.h.2.ln_1.weight"),
        ({"n_layer": 1}, "unexpected transformer.h.1.attn.c_attn.bias"),
        ({"n_embd": 32}, "transformer.wte.weight is (31, 16) instead of (31, 32)"),
        ({"n_layer": "2"}, "config.json: n_layer must be a whole number above 0, got '2'"),
        ({"n_head": 3}, "config.json: n_embd=16 is not divisible by n_head=3"),
        ({"model_type": "llama"}, "config.json: model_type must be gpt2, got 'llama'"),
        ({"model_type": ..., "n_embd": ...}, "config.json: model_type must be gpt2, got None"),
        ({"activation_function": ["gelu"]}, "activation_function must be one of"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors(
    folder: Path, changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(folder, **changes)
    monkeypatch.setattr("model.weight_files._read_safetensor", lambda *_: pytest.fail("a tensor was read"))
    assert told in refusal(folder)


def test_at_a_url_the_header_is_all_that_is_read(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    edit(folder, lambda x: x.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(16, 47)}))
    for file in folder.iterdir():
        memory.pipe_file(f"/variants/{file.name}", file.read_bytes())
    local_copy: list[str] = []
    get_file = memory.get_file
    memory.get_file = lambda *args: local_copy.append(args[0]) or get_file(*args)
    try:
        assert "transformer.h.0.attn.c_attn.weight is (16, 47) instead of (16, 48)" in refusal("memory://variants")
    finally:
        del memory.get_file
    assert local_copy == []


def test_a_pickle_at_a_url_is_looked_at_by_its_header_too(folder: Path, model: GPT) -> None:
    memory = fsspec.filesystem("memory")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("config.json", "pytorch_model.bin"):
        memory.pipe_file(f"/pickled/{name}", (folder / name).read_bytes())
    assert_is("memory://pickled", model)
    torch.save({**tensors, "transformer.wpe.weight": torch.zeros(13, 16)}, folder / "pytorch_model.bin")
    memory.pipe_file("/pickled/pytorch_model.bin", (folder / "pytorch_model.bin").read_bytes())
    assert "transformer.wpe.weight is (13, 16) instead of (12, 16)" in refusal("memory://pickled")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda x: x.update({"transformer.h.0.attn.rope.freqs": torch.ones(2)}),
            "unexpected transformer.h.0.attn.rope",
        ),
        (lambda x: x.update({"lm_head.bias": torch.ones(31)}), "unexpected lm_head.bias"),
        (lambda x: x.update({"wpe.weight": torch.zeros(12, 16)}), "are both transformer.wpe.weight"),
        (
            lambda x: x.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int8)}),
            "transformer.ln_f.bias is int8",
        ),
        (lambda x: x.update({HEAD: torch.zeros(30, 16)}), "lm_head.weight is (30, 16) instead of (31, 16)"),
    ],
)
def test_tensors_of_another_model(folder: Path, change: Edit, told: str) -> None:
    edit(folder, change)
    assert told in refusal(folder)


def test_an_untied_head_is_told_when_it_is_read(folder: Path) -> None:
    edit(folder, lambda x: x.update({HEAD: torch.zeros(31, 16)}))
    with (
        open_pretrained(str(folder), parameter_shapes) as found,
        pytest.raises(PretrainedError, match=r"lm_head\.weight differs"),
    ):
        list(found.tensors())


# files that are not whole, or not the files


def test_a_cut_off_file_is_told_by_its_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "model.safetensors cannot be read: it" in refusal(folder)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"[]", "its header is damaged"),
        (b'{"x": 3}', "its header is damaged"),
        (b'{"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}', "its header is damaged (KeyError: 'Q4')"),
        (b'{"x": {"dtype": "F32"}}', "its header is damaged"),
    ],
)
def test_a_header_of_something_else(folder: Path, header: bytes, told: str) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert told in refusal(folder)


def test_a_pointer_of_git_lfs_is_told(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors is a pointer of Git LFS" in refusal(folder)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (
            {"weight_map": {"wte.weight": "model-00002-of-00002.safetensors"}},
            "names a file that is not there: model-00002",
        ),
        ({"weights": {}}, "it has no weight_map"),
        ([], "it has no weight_map"),
        ({"weight_map": {"wte.weight": 3}}, "it has no weight_map"),
        ({"weight_map": {"lost.weight": "part.safetensors"}}, "part.safetensors lacks lost.weight"),
    ],
)
def test_an_index_that_names_what_is_not_there(folder: Path, index: Any, told: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert told in refusal(folder)


@pytest.mark.parametrize("content", [{"model": {"wte.weight": torch.zeros(2)}}, [torch.zeros(2)], {"n": 3}])
def test_a_pickle_that_is_no_dictionary_of_tensors(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is no dictionary of tensors" in refusal(folder)


def test_folders_without_weights_say_what_they_are(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, " in refusal(folder)
    (folder / "tf_model.h5").touch()
    assert "tf_model.h5 is of another framework" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json), which is no model: merge it" in refusal(folder)
    (folder / "config.json").unlink()
    assert "holds an adapter (adapter_config.json), which is no model: merge it" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    assert "no config.json there" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json: it holds a list, not the settings of a model" in refusal(folder)
