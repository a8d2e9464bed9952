"""Board: where the workers of a run post what the driver shows, and where it answers that they should stop.

One small actor beside the driver. Posting never waits and never fails a run: what is lost here is only display,
the metrics are in the run's folder.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_POST_INTERVAL_S = 1.0  # a call of Ray takes a millisecond or two of training
_KEPT_RECORDS = 10_000


class _Board:
    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=_KEPT_RECORDS)
        self._stopping = False
        self._words: list[Record] = []

    def say_last(self, word: Record) -> None:
        self._words.append(word)

    def last_words(self) -> list[Record]:
        words, self._words = self._words, []
        return words

    def post(self, records: list[Record]) -> bool:
        self._records.extend(records)
        return self._stopping

    def take(self, stop: bool) -> list[Record]:
        self._stopping = self._stopping or stop
        records = list(self._records)
        self._records.clear()
        return records


def open_board() -> Any:
    """Start the board on this driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()


def take_from(board: Any, stop: bool) -> list[Record]:
    """Return what was posted since the last call; stop tells the workers to save and leave."""
    try:
        return list(ray.get(board.take.remote(stop), timeout=10))
    except ray.exceptions.RayError as error:
        logger.warning("the display is lost, the run goes on: %s", type(error).__name__)
        return []


def note_on(board: Any, text: str, level: str = "INFO") -> None:
    """Post a line for the user."""
    board.post.remote([{"kind": "note", "level": level, "text": text}])


def tell_on(board: Any, kind: str, **values: Any) -> None:
    """Post an event, which the driver keeps."""
    board.post.remote([{"event": {"kind": kind, "time": time.time(), **values}}])


class Poster:
    """A worker's side of the board."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._waiting: list[Record] = []
        self._answer: Any = None
        self._posted_at_s = 0.0
        self._stopping = False

    def post(self, record: Record) -> None:
        """Hand a record over within a second or so."""
        self._waiting.append(record)

    def should_stop(self) -> bool:
        """Send what is waiting and return whether the driver asks to stop; costs nothing most of the time."""
        now_s = time.monotonic()
        if now_s - self._posted_at_s >= _POST_INTERVAL_S:
            self._posted_at_s = now_s
            self._take_answer(timeout_s=0)
            if self._answer is None:
                self._answer = self._send()
        return self._stopping

    def hurry(self) -> None:
        """Send what is waiting, from whatever thread: this process may be ended at any moment."""
        self._send()

    def say_last(self, word: Record) -> None:
        """Leave word of why this process ends, before it does: whoever finds it gone will ask for it."""
        with suppress(ray.exceptions.RayError):
            ray.get(self._board.say_last.remote(word), timeout=2)

    def close(self) -> None:
        """Send the rest and wait for it to arrive."""
        self._take_answer(timeout_s=5)
        self._answer = self._send()
        self._take_answer(timeout_s=5)

    def _send(self) -> Any:
        waiting, self._waiting = self._waiting, []
        return self._board.post.remote(waiting)

    def _take_answer(self, timeout_s: float) -> None:
        if self._answer is None or not ray.wait([self._answer], timeout=timeout_s)[0]:
            return
        try:
            self._stopping = bool(ray.get(self._answer))
        except ray.exceptions.RayError:
            logger.debug("the board is gone", exc_info=True)
        self._answer = None
