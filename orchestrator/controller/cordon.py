"""Cordon: nodes whose GPUs have failed. Workers are kept off them while other nodes have room.

Half an hour at most: after an update of its driver, or a restart, a machine is as good as any other. Knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_S = 1800.0


class Cordon:
    """Node ids, each for longest_s; clock: seconds that only grow."""

    def __init__(self, longest_s: float = _LONGEST_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._since_s: dict[str, float] = {}

    def put(self, node_id: str) -> None:
        """Keep workers off a node from now on."""
        self._since_s.pop(node_id, None)  # the newest one stands last
        self._since_s[node_id] = self._clock()

    def has_any(self) -> bool:
        """Return whether any node was ever cordoned."""
        return bool(self._since_s)

    def kept_off(self, wanted: int, room_without: Callable[[set[str]], int]) -> set[str]:
        """Return the nodes to keep workers off, so that as many as wanted still find room if that is possible.

        room_without: returns how many workers fit on the nodes outside a set. If there is too little room, the node
            that was cordoned first is used first.
        """
        now_s = self._clock()
        cordoned = [node for node, since_s in self._since_s.items() if now_s - since_s < self._longest_s]
        while cordoned and room_without(set(cordoned)) < wanted:
            cordoned = cordoned[1:]
        return set(cordoned)


CORDON = Cordon()  # of the controller's process: its attempts add to it, its scaling policy reads it
