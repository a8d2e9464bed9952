"""ckpt.pt files that people really have: of older versions, wrappers, forks, other optimizers, with numpy's values."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model import GPT, GPTConfig
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt, write_nanogpt
from orchestrator.checkpoint.formats.torch_load import load_torch_file
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.errors import CheckpointError

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 11, "bias": True, "dropout": 0.1}
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
Content = dict[str, Any]


def content(make_optimizer: Callable[..., torch.optim.Optimizer] | None = None, **changes: Any) -> Content:
    """Return what nanoGPT's train.py saves after two steps."""
    torch.manual_seed(1)
    args = {**ARGS, **changes}
    model = GPT(GPTConfig(**args))
    if make_optimizer:
        optimizer = make_optimizer(model.parameters())
    else:
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    for _ in range(2):
        model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
        optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args}
    return {**state, "iter_num": 2, "best_val_loss": 2.5, "config": {"dataset": "x"}}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Snapshot]:
    """Return a function that saves some content and reads it."""

    number = itertools.count()  # what was read stays mapped from its file

    def of(saved: Any, **options: Any) -> Snapshot:
        torch.save(saved, path := tmp_path / f"ckpt{next(number)}.pt")
        return read_nanogpt(path, **options)

    return of


def renamed(saved: Content, rename: Callable[[str], str]) -> Content:
    return {**saved, "model": {rename(name): tensor for name, tensor in saved["model"].items()}}


# what is taken


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod._forward_module."],
)
def test_wrappers_prefixes_are_taken_off(read: Any, prefix: str) -> None:
    plain = read(content())
    assert tensors_equal(read(renamed(content(), lambda name: prefix + name)), plain)


def test_wrappers_within_a_name_and_on_some_names_only(read: Any) -> None:
    plain = read(content())
    inner = renamed(
        content(), lambda name: name.replace("h.0.", "h.0._orig_mod.").replace("wpe", "_fsdp_wrapped_module.wpe")
    )
    assert tensors_equal(read(inner), plain)
    some = renamed(content(), lambda name: f"module.{name}" if "h.1" in name else name)
    assert tensors_equal(read(some), plain)


def test_two_names_that_become_one_are_refused(read: Any) -> None:
    saved = content()
    saved["model"]["module.transformer.wpe.weight"] = saved["model"]["transformer.wpe.weight"] + 1
    with pytest.raises(
        CheckpointError, match=r"transformer\.wpe\.weight and module\.transformer\.wpe\.weight are both"
    ):
        read(saved)


@pytest.mark.parametrize("absent", [HEAD, EMBEDDING])
def test_one_of_the_tied_names_stands_for_the_other(read: Any, absent: str) -> None:
    plain, saved = read(content()), content()
    del saved["model"][absent]
    assert tensors_equal(read(saved), plain)
    saved = content()
    saved["model"][absent] = saved["model"][absent] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        read(saved)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keys", [("bias",), ("bias", "dropout"), ("n_layer", "n_embd", "block_size", "vocab_size")])
def test_what_model_args_lacks_is_told_by_the_tensors(read: Any, keys: tuple[str, ...], bias: bool) -> None:
    plain, saved = read(content(bias=bias)), content(bias=bias)
    for key in keys:
        del saved["model_args"][key]
    snapshot = read(saved)
    assert tensors_equal(snapshot, plain)
    assert {**snapshot.model_args, "dropout": 0.1} == plain.model_args


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), "absent"])
def test_no_best_val_loss_is_nanogpts_first_one(read: Any, loss: Any) -> None:
    saved = {**content(), "best_val_loss": loss}
    if loss == "absent":
        del saved["best_val_loss"]
    assert read(saved).best_val_loss == 1e9


def test_without_iter_num_the_optimizers_steps_are_taken(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    saved = content()
    del saved["iter_num"]
    assert read(saved).iter_num == 2
    assert "no iter_num in it: 2 iterations are taken, as many as its optimizer has stepped" in caplog.text
    del saved["optimizer"]
    assert read(saved).iter_num == 0


def test_half_precision_weights_are_taken(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    saved = content()
    saved["model"] = {name: tensor.bfloat16() for name, tensor in saved["model"].items()}
    snapshot = read(saved)
    assert {tensor.dtype for tensor in snapshot.model.values()} == {torch.bfloat16}
    assert "its weights are bfloat16, they are taken as float32" in caplog.text


def test_numpys_values_are_plain_ones(read: Any) -> None:
    saved = content()
    saved |= {"best_val_loss": np.float64(2.5), "iter_num": np.int64(2)}
    saved["config"] = {"lr": np.float32(0.5), "on": np.bool_(True), "steps": np.arange(6).reshape(2, 3)}
    saved["config"] |= {
        "out": Path("/runs/x"),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "big": np.array([3], ">i4"),
    }
    saved["model_args"] |= {"n_layer": np.int32(2), "bias": np.bool_(True), "dropout": np.float16(0.5)}
    for group in saved["optimizer"]["param_groups"]:
        group |= {"lr": np.float64(0.25), "betas": (np.float64(0.9), np.float32(0.5))}
    snapshot = read(saved)
    assert (snapshot.iter_num, snapshot.best_val_loss) == (2, 2.5)
    assert [type(value) for value in (snapshot.iter_num, snapshot.best_val_loss)] == [int, float]
    assert snapshot.config["lr"] == 0.5
    assert snapshot.config["steps"] == [[0, 1, 2], [3, 4, 5]]
    assert (snapshot.config["on"], snapshot.config["big"], snapshot.config["out"]) == (True, [3], "/runs/x")
    assert snapshot.model_args["dropout"] == 0.5
    assert snapshot.param_groups[0].lr == 0.25
    assert snapshot.param_groups[0].betas == (0.9, 0.5)


@pytest.mark.parametrize(
    "value",
    [
        *(np.dtype(code).type(3) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")),
        np.str_("hé"),
        np.array(2.5),
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([True, False]),
    ],
)
def test_every_kind_of_number_keeps_its_value(tmp_path: Path, value: Any) -> None:
    torch.save({"value": value, "old": value}, path := tmp_path / "x.pt")
    read = load_torch_file(path, "x.pt")["value"]
    assert read == value.tolist()
    assert type(read) is type(value.tolist())


def test_names_of_numpy_before_version_2_are_known(tmp_path: Path) -> None:
    torch.save({"loss": np.float64(2.5), "array": np.arange(3.0)}, path := tmp_path / "x.pt")
    raw = path.read_bytes()
    assert b"numpy._core.multiarray" in raw
    target = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            record = old.read(info)
            new.writestr(info.filename, record.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    path.write_bytes(target.getvalue())
    assert load_torch_file(path, "x.pt") == {"loss": 2.5, "array": [0.0, 1.0, 2.0]}


def test_other_keys_are_left_out_with_a_note(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    saved = content()
    more = {"scaler": {"scale": 2.0}, "epoch": 3, "rng_state": torch.get_rng_state(), "python_rng": random.getstate()}
    assert tensors_equal(read({**saved, **more, "numpy_rng": np.random.get_state()}), read(saved))
    assert "left out: epoch, numpy_rng, python_rng, rng_state, scaler" in caplog.text


@pytest.mark.parametrize("key", ["flash", "use_rope", "softcap", "activation"])
def test_what_forks_have_switched_off_is_left_out(read: Any, key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    saved = content()
    saved["model_args"][key] = {"flash": True, "use_rope": False, "softcap": None, "activation": "gelu"}[key]
    assert read(saved).model_args["activation"] == "gelu"
    assert ("left out of model_args" in caplog.text) == (key != "activation")


# what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rope": True}, "model_args has rope=True, which this model does not have"),
        ({"logit_softcap": 30.0, "n_kv_head": 1}, "model_args has logit_softcap=30.0, n_kv_head=1, which"),
        ({"activation": "relu2"}, "its activation is 'relu2', this model has gelu, "),
        ({"n_layer": "two"}, "model_args has n_layer='two', which is no whole number above 0"),
        ({"n_head": 0}, "model_args has n_head=0"),
        ({"n_head": 3}, "n_embd=8 is not divisible by n_head=3"),
        ({"bias": "yes"}, "model_args has bias='yes'"),
    ],
)
def test_another_architecture_is_refused(read: Any, more: Content, message: str) -> None:
    saved = content()
    saved["model_args"] |= more
    with pytest.raises(CheckpointError, match=message):
        read(saved)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "its groups have no betas, but dampening"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "its groups have no betas"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "it has amsgrad=True"),
        (lambda p: torch.optim.Adam(p), "it has decoupled_weight_decay=False"),
        (lambda p: torch.optim.NAdam(p), "it has decoupled_weight_decay=False|it keeps"),
        (lambda p: torch.optim.AdamW(p), "it has 1 groups of parameters instead of 2"),
    ],
)
def test_another_optimizer_is_named_with_the_remedy(read: Any, make: Any, reason: str) -> None:
    saved = content(make)
    with pytest.raises(CheckpointError, match=f"not that of nanoGPT's AdamW .*({reason}).*--init_weights_only=True"):
        read(saved)
    assert read(saved, model_only=True).optimizer == {}


def test_lions_state_is_told_by_what_it_keeps(read: Any) -> None:
    saved = content()
    saved["optimizer"]["state"] = {i: {"exp_avg": torch.zeros(1)} for i in saved["optimizer"]["state"]}
    with pytest.raises(CheckpointError, match=r"it keeps exp_avg of a parameter"):
        read(saved)


@dataclass
class Config:
    """Of a fork."""

    n_layer: int = 2


class Trap:
    """Would run a command if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda c, _: c.update(model_args=argparse.Namespace(**ARGS)), r"'model_args' is of argparse\.Namespace"),
        (lambda c, _: c.update(model_args=Config()), rf"'model_args' is of {__name__}\.Config"),
        (lambda c, trap: c.update(best_val_loss=trap), r"'best_val_loss' is of posix\.system"),
        (lambda c, trap: c["config"].update(hooks=[0, trap]), r"'config'\['hooks'\]\[1\] is of posix\.system"),
        (lambda c, trap: c["model"].update(x=trap), r"'model'\['x'\] is of posix\.system"),
        (lambda c, _: c.update(what=np.array([Config()], dtype=object)), "a numpy value of type 'O8'|Config"),
        (lambda c, _: c.update(when=np.datetime64("2020-01-01")), "a numpy value of type 'M8'"),
    ],
)
def test_what_could_run_code_is_refused_by_key(read: Any, tmp_path: Path, change: Any, where: str) -> None:
    saved = content()
    change(saved, Trap(tmp_path / "ran"))
    with pytest.raises(CheckpointError, match=f"nothing is run from a checkpoint: .*({where})"):
        read(saved)
    assert not (tmp_path / "ran").exists()


def test_weights_files_under_this_name_are_told(read: Any, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in content()["model"].items()}
    with pytest.raises(
        CheckpointError, match=r"holds tensors and nothing else, as a Hugging Face folder's pytorch_model"
    ):
        read(tensors)
    save_file(tensors, tmp_path / "renamed.pt")
    with pytest.raises(CheckpointError, match=r"renamed\.pt is a safetensors file, not nanoGPT's ckpt\.pt"):
        read_nanogpt(tmp_path / "renamed.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match="a pointer of Git LFS"):
        read_nanogpt(tmp_path / "pointer.pt")
    with pytest.raises(CheckpointError, match=r"no 'model' in it.*it has 'state_dict', 'hyper_parameters'"):
        read({"state_dict": tensors, "hyper_parameters": {}})


@pytest.mark.parametrize("value", [-1, 2.5, float("nan"), "many", None])
def test_an_iteration_is_a_whole_number(read: Any, value: Any) -> None:
    if value is None:
        assert read({**content(), "iter_num": None}).iter_num == 2
        return
    with pytest.raises(CheckpointError, match=r"iter_num=(-1|2\.5|nan) is no number|could not convert"):
        read({**content(), "iter_num": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("best_val_loss", torch.ones(2)),
        ("best_val_loss", "low"),
        ("iter_num", torch.ones(2)),
        ("model", {3: torch.ones(1)}),
        ("model", [torch.ones(1)]),
        ("model_args", [2, 2, 8]),
        ("model_args", {**ARGS, "bias": torch.ones(2)}),
        ("config", [1]),
        ("optimizer", [1]),
        ("optimizer", {"state": [], "param_groups": {}}),
    ],
)
def test_values_of_another_shape_are_one_line(read: Any, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"ckpt\d\.pt"):
        read({**content(), key: value})


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_quantized_weights_are_refused(read: Any, dtype: torch.dtype) -> None:
    saved = content()
    saved["model"]["transformer.ln_f.weight"] = saved["model"]["transformer.ln_f.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight is of (int8|int64|bool), no tensor"):
        read(saved)


def test_the_activation_survives_the_way_through_nanogpts_format(read: Any, tmp_path: Path) -> None:
    snapshot = read(content())
    snapshot.model_args["activation"] = "gelu_tanh"
    write_nanogpt(snapshot, tmp_path / "again.pt")
    assert read_nanogpt(tmp_path / "again.pt").model_args["activation"] == "gelu_tanh"
