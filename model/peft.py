"""What an adapter of ours is called in peft's files, and back: names and adapter_config.json, as pure functions.

Must not know where files lie (`pretrained.py` reads them). Layers are never transposed: lora_A is (rank, in) and lora_B
(out, rank) in peft as well, whatever the layout of the weight beside them.

Source: https://github.com/huggingface/peft
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from model.huggingface import HUB_OWNER, PretrainedError
from model.lora import LAYERS, LoRAConfig
from model.names import renamed, without_wrappers

_PREFIX = "base_model.model."  # PeftModel, and the tuner in it
_NAME = re.compile(rf"(?:transformer\.)?(h\.\d+\.(?:{'|'.join(map(re.escape, LAYERS))})\.lora_[AB])(?:\.\w+)?\.weight")
# Keys of adapter_config.json that change nothing of what an adapter computes once it is there.
_HARMLESS = {
    *("task_type", "inference_mode", "peft_version", "auto_mapping", "runtime_config", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_pattern", "fan_in_fan_out", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "base_model_name_or_path", "revision"}
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # others change W
_MERGE = "Merge it into its base model (peft's merge_and_unload), save that, and give its folder"


def adapter_names(names: Iterable[str]) -> dict[str, str]:
    """Return our name -> the file's name.

    Names may come with or without `transformer.`, as of a GPT2Model, and with or without the adapter's own name.

    Raises:
        PretrainedError: one belongs to no adapter that a layer of ours can have, or two become one.
    """
    pairs: list[tuple[str, str]] = []
    others: list[str] = []
    for name in names:
        if found := _NAME.fullmatch(without_wrappers(name).removeprefix(_PREFIX)):
            pairs.append((name, f"transformer.{found[1]}"))
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise PretrainedError(
            f"it has {', '.join(others[:3])}{more}: adapters are computed here for {', '.join(LAYERS)} alone. {_MERGE}"
        )
    try:
        return renamed(pairs)
    except ValueError as error:
        raise PretrainedError(str(error)) from None


def lora_config(content: Mapping[str, Any], names: Iterable[str]) -> LoRAConfig:
    """Return what an adapter_config.json says. The tensors that are there decide which layers have an adapter.

    names: ours, of the tensors.

    Raises:
        PretrainedError: it is no adapter that we compute.
    """
    if not isinstance(content, Mapping):
        raise PretrainedError(f"it holds a {type(content).__name__}, not the settings of an adapter")
    if content.get("peft_type") != "LORA":
        raise PretrainedError(
            f"peft_type must be LORA, got {content.get('peft_type')!r}: no other adapter is known. {_MERGE}"
        )
    _refuse_unknown({key: value for key, value in content.items() if key not in _READ | _HARMLESS})
    rank, alpha, dropout = content.get("r", 8), content.get("lora_alpha", 8), content.get("lora_dropout", 0.0)
    if type(rank) is not int:
        raise PretrainedError(f"r must be a whole number, got {rank!r}")
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise PretrainedError(f"lora_alpha must be a number above 0, got {alpha!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise PretrainedError(f"lora_dropout must be a number from 0 up to 1, got {dropout!r}")
    there = {name.split(".", 3)[3].rpartition(".")[0] for name in names}
    try:
        return LoRAConfig(
            rank, float(alpha), tuple(layer for layer in LAYERS if layer in there), dropout=float(dropout)
        )
    except ValueError as error:
        raise PretrainedError(str(error)) from None


def _refuse_unknown(others: dict[str, Any]) -> None:
    """Check that nothing is switched on beside what we read.

    Raises:
        PretrainedError: something is that our adapters do not compute.
    """
    for key, plain in _PLAIN.items():
        value = others.pop(key, plain[0])
        if value is not None and value not in plain:
            raise PretrainedError(
                f"{key} must be {plain[0]!r}, got {value!r}: our adapters do not compute that. {_MERGE}"
            )
    if on := [f"{key}={value!r}" for key, value in others.items() if value]:
        raise PretrainedError(f"it has {', '.join(on)}, which our adapters do not compute. {_MERGE}")


def base_of_config(content: Mapping[str, Any]) -> tuple[str, str]:
    """Return the base model of an adapter_config.json, as init_from names it, and its revision; "" where it has none.

    The Hub's GPT-2 have their names without the owner's.
    """
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    return str(name or "").removeprefix(f"{HUB_OWNER}/"), str(revision or "")


def peft_config(lora: LoRAConfig, base: str, revision: str = "") -> dict[str, Any]:
    """Return the content of the adapter_config.json with which peft computes what our adapters compute.

    base: what `GPT2LMHeadModel.from_pretrained` takes. Its keys are those that peft has had since version 0.9.
    """
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": True,  # GPT-2's layers are Conv1D there
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": revision or None,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def to_peft(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return adapters under peft's names."""
    return {f"{_PREFIX}{name}.weight": tensor.contiguous() for name, tensor in adapters.items()}
