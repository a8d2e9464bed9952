"""Behind: calls that run one after the other in a thread of their own, while the caller goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BackgroundQueue:
    """A daemon thread: a call that hangs, on storage that does not answer, never keeps the process from ending.

    begin: called in it first of all. last: the future of the call that was submitted last.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self.last: Future[Any] | None = None
        self._calls.put((Future(), begin))  # whose error must not end the thread: others wait for what they submit
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def is_busy(self) -> bool:
        return self.last is not None and not self.last.done()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Call it after those that were submitted before; its value or error is the future's."""
        self.last = Future()
        self._calls.put((self.last, call))
        return self.last

    def close(self) -> None:
        """End the thread after what was submitted."""
        self._calls.put(None)

    def _run(self) -> None:
        while submitted := self._calls.get():
            future, call = submitted
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del submitted, future, call  # what they hold on to must not live until the next one comes
