"""peft's names and adapter_config.json: what is taken, what is refused by name, and what we write."""

from __future__ import annotations

from typing import Any

import pytest

from model import LoRAConfig, PretrainedError, peft_config, to_peft
from model.peft import adapter_names, base_of_config, lora_config

OURS = ["transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"]
PLAIN = peft_config(LoRAConfig(8), "openai-community/gpt2-xl")


@pytest.mark.parametrize(
    "template",
    [
        "base_model.model.transformer.h.0.attn.c_attn.{}.weight",
        "base_model.model.h.0.attn.c_attn.{}.weight",
        "base_model.model.transformer.h.0.attn.c_attn.{}.default.weight",
        "module.base_model.model._orig_mod.transformer.h.0.attn.c_attn.{}.weight",
        "transformer.h.0.attn.c_attn.{}.weight",
    ],
)
def test_names_are_ours_whoever_wrote_them(template: str) -> None:
    theirs = [template.format(part) for part in ("lora_A", "lora_B")]
    assert adapter_names(theirs) == dict(zip(OURS, theirs, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.transformer.wte.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.score.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.bias",
        "base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector.weight",
        "base_model.model.transformer.h.0.ln_1.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_other_tensors_are_refused_by_name(name: str) -> None:
    with pytest.raises(PretrainedError) as refused:
        adapter_names([f"base_model.model.{OURS[0]}.weight", name])
    assert str(refused.value).startswith(f"it has {name}: adapters are computed here for attn.c_attn, ")
    assert "peft's merge_and_unload" in str(refused.value)


def test_two_adapters_in_one_file_are_refused() -> None:
    names = [f"base_model.model.{OURS[0]}.{adapter}.weight" for adapter in ("default", "other")]
    with pytest.raises(PretrainedError, match=r"are both transformer\.h\.0\.attn\.c_attn\.lora_A"):
        adapter_names(names)


@pytest.mark.parametrize("alpha", [16.0, 2.5])
def test_our_settings_come_back(alpha: float) -> None:
    lora = LoRAConfig(4, alpha, ("attn.c_attn", "mlp.c_proj"), dropout=0.1)
    names = [
        f"transformer.h.{i}.{layer}.{part}" for i in range(2) for layer in lora.targets for part in ("lora_A", "lora_B")
    ]
    assert lora_config(peft_config(lora, "x"), names) == lora


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], r".*c_attn", None, ["c_fc", "lm_head"]])
def test_the_tensors_tell_the_layers(targets: Any) -> None:
    content = {**PLAIN, "target_modules": targets}
    assert lora_config(content, OURS).targets == ("attn.c_attn",)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_rslora": True}, r"it has use_rslora=True, which our adapters do not compute\. Merge it into its base"),
        ({"use_dora": True}, "it has use_dora=True"),
        ({"bias": "all"}, "bias must be 'none', got 'all': .* Merge it into its base"),
        ({"modules_to_save": ["lm_head"]}, r"it has modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"c_attn": 2}}, "it has rank_pattern="),
        ({"alpha_pattern": {"c_attn": 2}}, "it has alpha_pattern="),
        ({"layers_to_transform": [0]}, "it has layers_to_transform="),
        ({"layer_replication": [[0, 2]]}, "it has layer_replication="),
        ({"trainable_token_indices": [1]}, "it has trainable_token_indices="),
        ({"lora_bias": True}, "it has lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'"),
        ({"something_of_next_year": 3}, "it has something_of_next_year=3, which our adapters do not compute"),
        ({"r": 0}, "rank must be 1 or more, got 0"),
        ({"r": "8"}, "r must be a whole number, got '8'"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0, got None"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number from 0 up to 1"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PretrainedError, match=told):
        lora_config({**PLAIN, **changes}, OURS)


def test_a_config_that_is_none() -> None:
    with pytest.raises(PretrainedError, match="it holds a list"):
        lora_config([], OURS)  # type: ignore[arg-type]
    with pytest.raises(PretrainedError, match="targets must be some of"):
        lora_config(PLAIN, [])


@pytest.mark.parametrize(
    ("content", "base"),
    [
        ({"base_model_name_or_path": "openai-community/gpt2-xl", "revision": "15ea"}, ("gpt2-xl", "15ea")),
        ({"base_model_name_or_path": "gpt2", "revision": None}, ("gpt2", "")),
        ({"base_model_name_or_path": "/models/mine"}, ("/models/mine", "")),
        ({"base_model_name_or_path": None}, ("", "")),
        ({}, ("", "")),
    ],
)
def test_the_base_model_is_named_as_init_from_names_it(content: dict[str, Any], base: tuple[str, str]) -> None:
    assert base_of_config(content) == base


def test_what_we_write_has_pefts_names() -> None:
    import torch

    assert list(to_peft({OURS[0]: torch.zeros(1)})) == ["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    assert (PLAIN["fan_in_fan_out"], PLAIN["task_type"], PLAIN["lora_alpha"]) == (True, "CAUSAL_LM", 16)
