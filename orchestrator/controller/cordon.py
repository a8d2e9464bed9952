"""Bench: nodes whose GPUs have failed, and which workers are kept off while other nodes have room for them.

Half an hour at most: a driver that was being updated, or a machine that was restarted, is as good as any. Knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_S = 1800.0


class Cordon:
    """Node ids, each until it has sat there for longest_s; clock: seconds that only grow."""

    def __init__(self, longest_s: float = _LONGEST_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._since_s: dict[str, float] = {}

    def put(self, node_id: str) -> None:
        """Keep workers off a node from now on."""
        self._since_s.pop(node_id, None)  # the one that was put there last stands last
        self._since_s[node_id] = self._clock()

    def has_any(self) -> bool:
        """Return whether any node was ever put there."""
        return bool(self._since_s)

    def kept_off(self, wanted: int, room_without: Callable[[set[str]], int]) -> set[str]:
        """Return the nodes to keep off, so that there is room for the wanted number of workers, as far as ever.

        room_without: how many workers fit on the nodes that are not in a set. The one that has sat longest is used
        first.
        """
        now_s = self._clock()
        sitting = [node for node, since_s in self._since_s.items() if now_s - since_s < self._longest_s]
        while sitting and room_without(set(sitting)) < wanted:
            sitting = sitting[1:]
        return set(sitting)


CORDON = Cordon()  # of the controller's process: its attempts add to it, its scaling policy reads it
