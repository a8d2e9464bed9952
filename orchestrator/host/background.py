"""BackgroundQueue: runs calls one after the other in a thread of its own, while the caller goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

OnError = Callable[[BaseException], None] | None


class BackgroundQueue:
    """A daemon thread: a call that hangs, on storage that does not answer, never keeps the process from ending.

    begin: the thread calls it first of all. last: the future of the call that was submitted last.
    """

    def __init__(self, name: str, begin: Callable[[], object] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any], OnError] | None] = queue.SimpleQueue()
        self.last: Future[Any] | None = None
        self._calls.put((Future(), begin, None))  # its error must not end the thread: others wait for their own calls
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def is_busy(self) -> bool:
        return self.last is not None and not self.last.done()

    def submit(self, call: Callable[[], Any], on_error: OnError = None) -> Future[Any]:
        """Run `call` after all earlier ones; return a future of its value or error.

        on_error: hears of the error in the thread, before whoever waits for the future.
        """
        self.last = Future()
        self._calls.put((self.last, call, on_error))
        return self.last

    def close(self) -> None:
        """End the thread after the calls that were submitted."""
        self._calls.put(None)

    def _run(self) -> None:
        while submitted := self._calls.get():
            future, call, on_error = submitted
            try:
                future.set_result(call())
            except BaseException as error:  # any: whoever waits for the future has to hear of it
                if on_error:
                    on_error(error)
                future.set_exception(error)
            del submitted, future, call, on_error  # they hold tensors, which must not live until the next call comes
