"""Whether a run's adapters are those that the settings ask for: of the run in out_dir, and of what init_from names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model.lora import LoRAConfig, targets_of
from orchestrator.checkpoint.formats.sources import Kind, ModelSource, base_of
from orchestrator.checkpoint.snapshot import Adapters, Snapshot
from orchestrator.config import TrainConfig, check_rank
from orchestrator.errors import ConfigError


def lora_of(config: TrainConfig) -> LoRAConfig | None:
    """Return the adapters that the settings ask for, None for none. Dropout is the next attempt's own."""
    if not config.lora_rank:
        return None
    return LoRAConfig(config.lora_rank, config.lora_alpha, targets_of(config.lora_targets), config.lora_base_dtype)


def told(lora: LoRAConfig) -> str:
    """Return the flags that ask for such adapters."""
    flags = [f"--lora_rank={lora.rank}", f"--lora_alpha={lora.alpha:g}", f"--lora_targets={','.join(lora.targets)}"]
    flags += [f"--lora_dropout={lora.dropout:g}"] if lora.dropout else []
    flags += [f"--lora_base_dtype={lora.base_dtype}"] if lora.base_dtype != "float32" else []
    return " ".join(flags)


def told_to_go_on(found: Snapshot) -> str:
    """Return the flags with which a run goes on with a state's adapters as they were trained, with their dropout."""
    assert found.adapters
    return told(replace(found.adapters.lora, dropout=float(found.config.get("lora_dropout", 0.0))))


def as_saved(config: TrainConfig, saved: Adapters | None) -> TrainConfig:
    """Return the settings with which the run in out_dir goes on: with its own adapters, if they were left out."""
    lora = saved.lora if saved else None
    return replace(
        config,
        init_from="resume",
        lora_rank=lora.rank if lora else 0,
        lora_alpha=lora.alpha if lora else config.lora_alpha,
        lora_targets=",".join(lora.targets) if lora else config.lora_targets,
        lora_base_dtype="bfloat16" if lora and lora.base_dtype == "bfloat16" else "float32",
    )


def check_same_adapters(config: TrainConfig, saved: dict[str, Any] | None) -> None:
    """Compare the adapters of the run in out_dir, as its state.json has them, with the settings.

    With init_from=resume the settings may leave them out, as they may leave out a shape.

    Raises:
        ConfigError: they differ.
    """
    wanted, has = lora_of(config), Adapters.from_json(saved).lora if saved else None
    if wanted == has or (wanted is None and config.init_from == "resume"):
        return
    asked = told(wanted) if wanted else "--lora_rank=0"
    if not has:
        raise ConfigError(
            f"out_dir={config.out_dir} holds a run that trains all weights, asked for {asked}. Leave lora_rank out to "
            f"go on, or train adapters of its model: --init_from={config.out_dir} and another --out_dir"
        )
    raise ConfigError(
        f"out_dir={config.out_dir} holds a run that trains adapters, {told(has)}, asked for {asked}: give those "
        "settings or another --out_dir"
    )


def check_adapters(config: TrainConfig, found: Snapshot, source: ModelSource) -> None:
    """Compare the adapters of the source that init_from names with the settings; found: its state.

    Raises:
        ConfigError: they differ, or all weights are to be trained and nothing says that they are to be merged, or it
            is a whole model, and a base model is named besides.
    """
    wanted = lora_of(config)
    if found.adapters is None:
        if config.lora_base:
            raise ConfigError(
                f"lora_base={config.lora_base} tells where the base model of adapters lies, and init_from="
                f"{config.init_from} is a whole model: a new run begins with that one. Leave lora_base out"
            )
        return
    has = found.adapters.lora
    if wanted is None:
        if config.init_weights_only or config.eval_only:
            return
        raise ConfigError(
            f"init_from={config.init_from} holds adapters. To go on with them, give {told_to_go_on(found)}; to "
            "train all weights of the model that they make, give --init_weights_only=True"
        )
    if source.kind is Kind.ADAPTER:  # which does not say in which type the rest is held
        has = replace(has, base_dtype=wanted.base_dtype)
    if wanted != has:
        raise ConfigError(
            f"init_from={config.init_from} holds adapters, {told(has)}, asked for {told(wanted)}: give those settings, "
            "or merge them (`orchestrator export --format=hf`) and begin with that folder"
        )


def adapters_to_train(config: TrainConfig, source: ModelSource, found: Snapshot) -> Adapters | None:
    """Return the adapters of a run that begins with a source, None where all weights are trained.

    found: the source's state. Its adapters go on, whatever their rank; otherwise it is the base model of new ones.

    Raises:
        ConfigError: the rank of new ones is over the model's width.
    """
    wanted = lora_of(config)
    if wanted is None:
        return None
    if found.adapters:
        return Adapters(wanted, found.adapters.base)
    check_rank(config, found.model_args)
    return Adapters(wanted, base_of(source))
