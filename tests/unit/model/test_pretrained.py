"""Pretrained weights: what transformers writes we read, what we write transformers reads, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from model import (
    GPT,
    GPTConfig,
    PretrainedError,
    from_huggingface,
    huggingface_config,
    read_pretrained_args,
    to_huggingface,
)

IDX = torch.arange(24).view(2, 12) * 7 % 31


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 31}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1, activations large enough to bend
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def expected(reference: GPT2LMHeadModel) -> Tensor:
    return logits_of(reference)


@pytest.fixture
def folder(reference: GPT2LMHeadModel, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "gpt2", reference.config.to_dict(), reference.state_dict())


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    return folder


def logits_of(model: GPT | GPT2LMHeadModel) -> Tensor:
    with torch.no_grad():
        return model(IDX).logits if isinstance(model, GPT2LMHeadModel) else model.eval()(IDX, IDX)[0]


def assert_loads(source: Path | str, expected: Tensor) -> GPT:
    model = GPT.from_pretrained(str(source))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def test_folder_written_by_transformers(reference: GPT2LMHeadModel, expected: Tensor, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    model = assert_loads(tmp_path, expected)
    assert model.config == GPTConfig(12, 31, 2, 2, 16, 0.0, True, "gelu_tanh")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sharded_folder_written_by_transformers(reference: GPT2LMHeadModel, expected: Tensor, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_loads(tmp_path, expected)


def test_pickled_weights_with_masks_and_bare_names(folder: Path, expected: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(bare, folder / "pytorch_model.bin")
    assert_loads(folder, expected)


def test_pickled_weights_of_the_format_before_zip(folder: Path, expected: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_loads(folder, expected)


def test_url(folder: Path, expected: Tensor) -> None:
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/pretrained/{file.name}", file.read_bytes())
    assert_loads("memory://pretrained", expected)
    assert_loads(folder.as_uri(), expected)
    assert read_pretrained_args("memory://pretrained")["n_layer"] == 2


def test_half_precision_is_widened(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert {p.dtype for p in GPT.from_pretrained(str(folder)).parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "activation"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh")])
def test_activation_follows_the_config(folder: Path, name: str, activation: str) -> None:
    edit_config(folder, activation_function=name)
    assert GPT.from_pretrained(str(folder)).config.activation == activation


def test_dropout_alone_can_be_overridden(folder: Path) -> None:
    assert GPT.from_pretrained(str(folder), {"dropout": 0.1}).config.dropout == 0.1
    with pytest.raises(ValueError, match="block_size"):
        GPT.from_pretrained(str(folder), {"dropout": 0.1, "block_size": 4})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_our_model_in_transformers_and_back(tmp_path: Path, bias: bool, activation: str) -> None:
    torch.manual_seed(1)
    ours = GPT(GPTConfig(12, 31, 2, 2, 16, bias=bias, activation=activation))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tensors = to_huggingface(ours.state_dict())
    folder = write_folder(tmp_path / "export", huggingface_config(ours.config), tensors)

    theirs, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(theirs.eval()), logits_of(ours), atol=1e-4, rtol=0)

    back = from_huggingface(tensors.items())
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(logits_of(GPT.from_pretrained(str(folder))), logits_of(ours), atol=1e-6, rtol=0)


def test_export_needs_no_tied_head() -> None:
    state = GPT(GPTConfig(12, 31, 1, 2, 16)).state_dict()
    tied = state.pop("lm_head.weight")
    tensors = to_huggingface(state)
    assert "lm_head.weight" not in tensors
    assert torch.equal(from_huggingface(tensors.items())["lm_head.weight"], tied)


@pytest.mark.parametrize(("vocab_size", "end_of_text"), [(50304, 50256), (65, None)])
def test_end_of_text_lies_within_the_vocabulary(vocab_size: int, end_of_text: int | None) -> None:
    assert huggingface_config(GPTConfig(vocab_size=vocab_size))["eos_token_id"] == end_of_text


@pytest.mark.parametrize(
    ("name", "n_params"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_sizes_of_the_named_models(name: str, n_params: int) -> None:
    args = read_pretrained_args(name)
    with torch.device("meta"):
        model = GPT(GPTConfig(**args))
    assert model.get_num_params(non_embedding=False) == n_params
    assert args["activation"] == "gelu_tanh"


def test_unreachable_hub_says_how_to_bring_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: str, **__: bool) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        PretrainedError, match=r"(?s)offline.*config\.json and model\.safetensors of openai-community/gpt2"
    ):
        GPT.from_pretrained("gpt2")


def test_named_model_comes_from_the_hub(folder: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[bool] = []

    def download(repo_id: str, filename: str, revision: str | None, local_files_only: bool = False) -> str:
        assert (repo_id, revision) == ("openai-community/gpt2", None)
        asked.append(not local_files_only)
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(__import__("model.pretrained").pretrained.GPT2_SIZES, "gpt2", {"n_layer": 2})
    monkeypatch.setattr("model.pretrained.read_pretrained_args", lambda _: read_pretrained_args(str(folder)))
    assert_loads("gpt2", expected)
    assert asked[:2] == [False, True], "the cache, then the Hub"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, drop: str = "", **changes: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    save_file(tensors | changes, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"n_inner": 20}, r"4 \* n_embd = 64, got 20"),
        ({"activation_function": "relu"}, "'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ({"layer_norm_epsilon": 1e-6}, "1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_other_architectures_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(PretrainedError, match=message):
        read_pretrained_args(str(folder))


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    extra = {"transformer.h.2.ln_1.bias": torch.zeros(16), "transformer.wpe.weight": torch.zeros(9, 16)}
    edit_tensors(folder, drop="transformer.h.1.ln_2.weight", **extra)
    with pytest.raises(PretrainedError) as caught:
        GPT.from_pretrained(str(folder))
    assert "missing transformer.h.1.ln_2.weight" in str(caught.value)
    assert "unexpected transformer.h.2.ln_1.bias" in str(caught.value)
    assert "transformer.wpe.weight is (9, 16) instead of (12, 16)" in str(caught.value)


def test_untied_head_is_refused(folder: Path) -> None:
    edit_tensors(folder, **{"lm_head.weight": torch.zeros(31, 16)})
    with pytest.raises(PretrainedError, match=r"lm_head\.weight differs"):
        GPT.from_pretrained(str(folder))


def test_truncated_file_is_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(PretrainedError, match=r"model\.safetensors cannot be read"):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("shard", "message"), [("model-00002-of-00002.safetensors", "00002-of-00002"), ("../secret.safetensors", "outside")]
)
def test_wrong_shard_is_refused(folder: Path, shard: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    with pytest.raises(PretrainedError, match=message):
        GPT.from_pretrained(str(folder))


def test_pickle_that_could_run_code_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": logging.getLogger()}, folder / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match=r"pytorch_model\.bin cannot be read"):
        GPT.from_pretrained(str(folder))


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PretrainedError, match=r"no config\.json there; pretrained weights are one of gpt2, gpt2-medium"
    ):
        GPT.from_pretrained(str(tmp_path / "nowhere"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(PretrainedError, match=r"none of model\.safetensors"):
        GPT.from_pretrained(str(folder))
    with pytest.raises(PretrainedError, match="nosuch://bucket"):
        read_pretrained_args("nosuch://bucket/gpt2")
