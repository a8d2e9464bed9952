"""Reachability: which nodes answer. The operating system knows at once; Ray waits for missed heartbeats.

A connection to a node's raylet is accepted by the kernel there, however busy the node is. It is refused when the raylet
has ended, and not answered at all when the node is off or its link is cut. Knows no Ray but the form of `ray.nodes()`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_ANSWER_S = 1.0
_AT_ONCE = 32  # connections
_SILENCE_S = 5.0  # after which a node whose workers seem to run is given up


def unreachable_nodes(nodes: list[dict[str, Any]], answer_s: float = _ANSWER_S) -> set[str]:
    """Return the ids of nodes that Ray takes for alive, and that do not answer; nodes: as ray.nodes() lists them."""
    alive = [node for node in nodes if node["Alive"]]
    if not alive:
        return set()
    with ThreadPoolExecutor(min(_AT_ONCE, len(alive))) as pool:
        answers = pool.map(
            lambda node: answers_at(node["NodeManagerAddress"], node["NodeManagerPort"], answer_s), alive
        )
        return {node["NodeID"] for node, has_answered in zip(alive, answers, strict=True) if not has_answered}


def answers_at(host: str, port: int, answer_s: float = _ANSWER_S) -> bool:
    """Return whether anybody listens there."""
    try:
        socket.create_connection((host, port), timeout=answer_s).close()
    except OSError:
        return False
    return True


class ReachabilityMonitor:
    """A thread that watches whether the nodes of a group answer; calls on_silence once for each that does not."""

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        on_silence: Callable[[str], None],
        silence_s: float = _SILENCE_S,
        every_s: float = 1.0,
    ) -> None:
        self._nodes, self._on_silence = nodes, on_silence
        self._silence_s, self._every_s = silence_s, every_s
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="reachability", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        since_s: dict[str, float] = {}
        reported: set[str] = set()
        while not self._closed.wait(self._every_s):
            silent = unreachable_nodes(self._nodes)
            since_s = {node: since_s.get(node, time.monotonic()) for node in silent}
            for node, began_s in since_s.items():
                if time.monotonic() - began_s >= self._silence_s - _ANSWER_S and node not in reported:
                    reported.add(node)
                    self._on_silence(node)
