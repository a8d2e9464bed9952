"""Terminals and pipes that our output goes to."""

from __future__ import annotations

import select


def has_lost_its_reader(output: int) -> bool:
    """Return whether nobody reads a file descriptor any more: `| head` has enough, or the terminal was closed."""
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
