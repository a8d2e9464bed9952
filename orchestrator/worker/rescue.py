"""Rescue: how Ray's controller reaches the state of a process that trains.

Training has a thread of its own in Ray's worker process. Ray runs `begin_rescue` and `end_rescue` in another thread, so
they answer even where training waits for a peer that is gone.
"""

from __future__ import annotations

import threading

from orchestrator.checkpoint.save.saver import Saver
from orchestrator.cluster.mailbox import MailboxClient
from orchestrator.storage.run_folder import RunFolder


class RunningWorker:
    """What the other threads of this process need of the worker in it.

    folder: the run's, None until it is open. saver: None until training is about to begin.
    """

    def __init__(self, mailbox: MailboxClient) -> None:
        self.mailbox = mailbox
        self.folder: RunFolder | None = None
        self.saver: Saver | None = None
        self._thread: threading.Thread | None = None

    @property
    def changed_at_s(self) -> float:
        """When the state has changed last (seconds since 1970), 0 before it is there."""
        return self.saver.changed_at_s if self.saver else 0.0

    def rescue(self, **options: float) -> tuple[int | None, float | None]:
        """Put the state into node memory.

        Returns the iteration that is safe, and when it was completed (seconds since 1970); None where none is.
        """
        iter_num = self.saver.rescue(**options) if self.saver else None
        return (None, None) if iter_num is None else (iter_num, self.changed_at_s)

    def begin_rescue(self) -> None:
        """Start the rescue in the background."""
        self._thread = threading.Thread(target=self.rescue, name="rescue", daemon=True)
        self._thread.start()

    def end_rescue(self) -> tuple[int | None, float | None]:
        """Wait for the rescue, send what is left for the driver, and return as `rescue` does."""
        if self._thread:
            self._thread.join()
        self.mailbox.hurry()
        return self.rescue()


_running: RunningWorker | None = None  # in a process of Ray's there is one worker


def register(worker: RunningWorker) -> None:
    """Make this process's worker known to the calls below."""
    global _running
    _running = worker


def begin_rescue() -> None:
    """Start this process's rescue in the background. Ray's controller calls this before it ends a group."""
    if _running:
        _running.begin_rescue()


def end_rescue() -> tuple[int | None, float | None]:
    """Wait for this process's rescue; return the iteration that is safe and when it was completed."""
    return _running.end_rescue() if _running else (None, None)
