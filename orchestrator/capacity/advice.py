"""Advice: the cheapest change of settings with which a run fits a card. The global batch stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

from orchestrator.capacity.cards import Card
from orchestrator.capacity.gpu import gpu_memory, most_held_sums
from orchestrator.capacity.shape import ModelShape, with_adapters
from orchestrator.config import TrainConfig

Change = dict[str, Any]  # key -> value
_RANK, _LOSS_CHUNK = 8, 256


def advise(config: TrainConfig, shape: ModelShape, card: Card) -> Change | None:
    """Return the first change that fits: one of LoRA, activation checkpointing, loss in chunks, smaller micro-steps and
    more workers, in this order; then of two of them together, and so on. None if nothing does.

    {}: it fits as it is.
    """
    options = [list(option(config)) for option in (_FOR_EVALUATION if config.eval_only else _OPTIONS)]
    for count in range(len(options) + 1):
        for chosen in combinations(options, count):
            for parts in product(*chosen):
                change = {key: value for part in parts for key, value in part.items()}
                if _fits(replace(config, **change), shape, card):
                    return change
    return None


def flags_of(change: Change) -> str:
    """Return a change as flags."""
    return " ".join(f"--{key}={value}" for key, value in change.items())


def _fits(config: TrainConfig, shape: ModelShape, card: Card) -> bool:
    assert card.memory_bytes
    return gpu_memory(config, with_adapters(shape, config), card).fits(card.memory_bytes)


def _lora(config: TrainConfig) -> Iterator[Change]:
    if config.init_from not in ("scratch", "resume"):  # one has nothing to freeze, the other goes on as it was begun
        rank = {} if config.lora_rank else {"lora_rank": _RANK}
        if rank:
            yield rank
        if config.lora_base_dtype == "float32":
            yield {**rank, "lora_base_dtype": "bfloat16"}


def _activation_checkpointing(config: TrainConfig) -> Iterator[Change]:
    if not config.activation_checkpointing:
        yield {"activation_checkpointing": True}


def _loss_chunk(config: TrainConfig) -> Iterator[Change]:
    if not config.loss_chunk and config.batch_size * config.block_size > _LOSS_CHUNK:
        yield {"loss_chunk": _LOSS_CHUNK}


def _smaller_micro_steps(config: TrainConfig) -> Iterator[Change]:
    for batch_size in range(config.batch_size - 1, 0, -1):
        if config.batch_size % batch_size == 0:
            times = "eval_iters" if config.eval_only else "gradient_accumulation_steps"
            yield {"batch_size": batch_size, times: getattr(config, times) * config.batch_size // batch_size}


def _more_workers(config: TrainConfig) -> Iterator[Change]:
    """Fewer lanes for each of the fewest workers: fewer sums wait."""
    most = config.max_workers
    held = most_held_sums(config)
    for fewest in range(config.min_workers + 1, most + 1):
        change: Change = {"num_workers": f"{fewest}-{most}" if fewest < most else most}
        if (held_then := most_held_sums(replace(config, **change))) < held:
            yield change
        held = min(held, held_then)


_OPTIONS: tuple[Callable[[TrainConfig], Iterator[Change]], ...] = (
    _lora,
    _activation_checkpointing,
    _loss_chunk,
    _smaller_micro_steps,
    _more_workers,
)
_FOR_EVALUATION = (_loss_chunk, _smaller_micro_steps)
