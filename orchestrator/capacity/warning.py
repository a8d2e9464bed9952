"""The warning at the start of a run that probably does not fit its GPUs, by the plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator.capacity.advice import advise, flags_of
from orchestrator.capacity.cards import Card
from orchestrator.capacity.gpu import MARGIN, gpu_memory
from orchestrator.capacity.shape import shape_of
from orchestrator.config import TrainConfig


def memory_warning(config: TrainConfig, model_args: dict[str, Any], cards: Iterable[Card]) -> str:
    """Return why a run probably does not fit the smallest of its cards, and the flags that help; "" if it fits.

    config: of a run that goes on with init_from=resume, whatever it was begun with.
    """
    known = [card for card in cards if card.memory_bytes]
    if not known:
        return ""
    card = min(known, key=lambda each: each.memory_bytes or 0)
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
