"""The signals that ask a process of ours to stop: it finishes its iteration, saves and leaves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def on_stop_signals(
    act: Callable[[int], None], stay_ignored: Collection[signal.Signals] = (signal.SIGHUP,)
) -> Iterator[None]:
    """Call `act` with the number of each stop signal while the block runs. Only the main thread may do so.

    stay_ignored: signals that stay ignored where they were before, as nohup ignores SIGHUP.
    """
    caught = [
        number for number in STOP_SIGNALS if number not in stay_ignored or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, lambda got, _frame: act(got)) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
