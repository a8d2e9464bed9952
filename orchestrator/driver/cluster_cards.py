"""The GPUs of a cluster, for the warning of a run that will not fit them. Asks Ray for nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator.capacity.cards import Card, card_named

_ACCELERATOR = "accelerator_type:"  # begins a resource of a node with GPUs, as Ray names them


def cards_of(nodes: Iterable[dict[str, Any]]) -> list[Card]:
    """Return the cards of live nodes that we know; nodes: as ray.nodes() lists them."""
    names = (name for node in nodes if node["Alive"] for name in node["Resources"])
    found = (card_named(name.removeprefix(_ACCELERATOR)) for name in names if name.startswith(_ACCELERATOR))
    return [card for card in found if card]
