"""A warning at the start of a run that will not fit the GPUs of its cluster, by the plan. Asks Ray for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.capacity.advice import advise, flags_of
from orchestrator.capacity.cards import Card, card_named
from orchestrator.capacity.gpu import MARGIN, gpu_memory
from orchestrator.capacity.shape import shape_of
from orchestrator.config import TrainConfig

_ACCELERATOR = "accelerator_type:"  # begins a resource of a node with GPUs, as Ray names them


def memory_warning(config: TrainConfig, model_args: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> str:
    """Return why a run probably does not fit the smallest card there is, and the flags that help; "" if it fits.

    nodes: as ray.nodes() lists them.
    """
    cards = [card for card in cards_of(nodes) if card.memory_bytes]
    if not cards:
        return ""
    card = min(cards, key=lambda each: each.memory_bytes or 0)
    shape = shape_of(config, model_args)
    memory = gpu_memory(config, shape, card)
    assert card.memory_bytes
    if memory.fits(card.memory_bytes):
        return ""
    change = advise(config, shape, card)
    remedy = f"It fits with {flags_of(change)}" if change else "No change of settings that we know makes it fit"
    return (
        f"a GPU would hold {memory.total / 1e9:.1f} GB by our plan, and {card.name} has "
        f"{card.memory_bytes / 1e9:.0f} GB, of which we leave {MARGIN:.0%} free: this run may end for lack of memory. "
        f"{remedy}; `orchestrator plan` with the same settings tells more"
    )


def cards_of(nodes: Iterable[dict[str, Any]]) -> list[Card]:
    """Return the cards of live nodes that we know."""
    names = (name for node in nodes if node["Alive"] for name in node["Resources"])
    found = (card_named(name.removeprefix(_ACCELERATOR)) for name in names if name.startswith(_ACCELERATOR))
    return [card for card in found if card]
