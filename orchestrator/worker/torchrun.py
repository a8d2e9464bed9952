"""PeerLossGuard: ends a process of torchrun's whose peers are gone, with its state rescued. Knows no Ray.

With NCCL a collective whose peer is gone never returns. It waits in C, where Python handles no signal. torchrun ends
the processes of a group that has lost one: SIGTERM, and SIGKILL half a minute later. In between a thread puts the state
into node memory, from which the same command goes on. Under Ray the AttemptMonitor sees to that.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import TracebackType

from orchestrator.checkpoint.save.saver import Saver
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder
from orchestrator.worker.stack_file import keep_stacks, stack_file
from orchestrator.worker.watchdog import Watchdog, stacks

_ITERATION_S = 20.0  # in which a process that is asked to stop comes to the end of its iteration, or is taken for stuck


class PeerLossGuard:
    """Of one process among several. A process that is alone waits for nobody: it is never ended here, however slow."""

    def __init__(self, config: TrainConfig, world: World, folder: RunFolder) -> None:
        self._world, self._folder = world, folder
        self._saver: Saver | None = None
        self._beats = 0
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._watchdog = Watchdog(config.hang_timeout_s, self._hangs) if world.size > 1 else None
        self._signals: socket.socket | None = None  # Python writes signal numbers here while the main thread is stuck

    def __enter__(self) -> PeerLossGuard:
        if self._watchdog:
            receiver, self._signals = socket.socketpair()
            self._signals.setblocking(False)
            signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(receiver,), name="peer loss guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._watchdog and self._signals:
            self._watchdog.close()
            signal.set_wakeup_fd(-1)
            self._signals.close()  # which ends the thread

    def guard(self, saver: Saver) -> None:
        """Take the Saver, which can rescue the state."""
        self._saver = saver

    def beat(self) -> None:
        """Note that an iteration ends, or a batch of an evaluation."""
        self._beats += 1
        if self._watchdog:
            self._watchdog.beat(self._saver.changed_at_s if self._saver else 0.0)

    def _listen(self, receiver: socket.socket) -> None:
        """Wait for a stop signal; end this process unless the loop takes notice, too."""
        with receiver:
            while receiver.recv(64):
                beats = self._beats
                is_closed = self._closed.wait(_ITERATION_S)
                if not is_closed and self._beats == beats and not self._is_finishing():
                    self._end(f"asked to stop, and this iteration did not end within {_ITERATION_S:.0f} s")

    def _hangs(self, silence_s: float) -> bool:
        if self._is_finishing():
            return False
        self._end(f"no progress for {silence_s:.0f} s")
        return True

    def _is_finishing(self) -> bool:
        """Return whether an upload is waited for, which has limits of its own."""
        return self._saver is not None and self._saver.is_finishing

    def _end(self, why: str) -> None:
        """Rescue the state, say so, and end this process."""
        with self._ending:
            found = stacks()
            iter_num = self._saver.rescue(stand_in_s=0.5) if self._saver else None
            keep_stacks(self._folder, self._world, found)
            safe = "" if iter_num is None else f"; iteration {iter_num} is safe in node memory"
            print(
                f"error: rank {self._world.rank}: {why}, as when another rank is gone or stands still{safe}; the same "
                f"command goes on from there (the stacks are in {stack_file(self._world)} in out_dir)",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
