"""Lanes: which rank computes which micro-steps, and in which order their gradients are added. Plain arithmetic.

A run has a fixed number of lanes. Lanes get contiguous stretches of an iteration's micro-steps, ranks get contiguous
stretches of lanes. A lane adds up its micro-steps one after the other; the lanes are added in a fixed binary tree that
splits at the middle. Neither depends on the number of ranks, so the sum has the same bits on any number.

Must not know tensors, ranks' messages or settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

Span = tuple[int, int]  # lanes first to last - 1
_LARGEST_PART = 0.25  # of a device's room, for sums that wait; else they wait in host memory


@dataclass(frozen=True)
class Lanes:
    """How many lanes share an iteration's micro-steps; count is at most micro_steps."""

    count: int
    micro_steps: int

    def of_rank(self, rank: int, size: int) -> range:
        """Return the lanes of one of `size` ranks, at least one; size is at most count."""
        return range(rank * self.count // size, (rank + 1) * self.count // size)

    def micro_steps_of(self, lanes: range) -> range:
        """Return the micro-steps of a stretch of lanes: j belongs to lane floor(j * count / micro_steps)."""
        first, end = (-(-lane * self.micro_steps // self.count) for lane in (lanes.start, lanes.stop))
        return range(first, end)

    def joins(self, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Return how sums of adjacent spans are added up in order, as far as the tree goes.

        Returns:
            For each span the number of sums, those that waited last, that its own is added to before it waits as well;
            and the spans of the sums that wait in the end: the roots of the tree's largest parts.
        """
        tree = _tree(self.count)
        joined, waiting = [], list[Span]()
        for first, end in spans:
            joined.append(0)
            while waiting and (waiting[-1][0], end) in tree:
                first = waiting.pop()[0]
                joined[-1] += 1
            waiting.append((first, end))
        return joined, waiting

    def roots(self, rank: int, size: int) -> list[Span]:
        """Return the sums that a rank comes to by itself, and hands on."""
        return self.joins([(lane, lane + 1) for lane in self.of_rank(rank, size)])[1]

    def held_sums(self, rank: int, size: int) -> int:
        """Return the largest number of sums that wait while a rank computes a lane: its buffers beyond the gradient."""
        joined, _ = self.joins([(lane, lane + 1) for lane in self.of_rank(rank, size)])
        waiting = most = 0
        for count in joined:
            most = max(most, waiting)
            waiting += 1 - count
        return most

    def most_held_sums(self, size: int) -> int:
        """Return `held_sums` of the rank that has most."""
        return max(self.held_sums(rank, size) for rank in range(size))

    def balance(self, size: int) -> float:
        """Return the micro-steps of the rank that has most, as a multiple of an even share; 1.0 is perfect."""
        fullest = max(len(self.micro_steps_of(self.of_rank(rank, size))) for rank in range(size))
        return fullest / -(-self.micro_steps // size)


def default_lanes(fewest: int, most: int, micro_steps: int, *, has_room: bool = True) -> int:
    """Return how many lanes a run on `fewest` to `most` workers begins with.

    A fixed number of workers is its own number of lanes: no sum waits. With a range, four lanes for each of the most
    workers keep every number of workers between busy; has_room: for the sums that wait then.
    """
    return 4 * most if fewest < most and 4 * most <= micro_steps and has_room else most


def wait_on_device(held_bytes: int, gradient_bytes: int, free_bytes: int, total_bytes: int) -> bool:
    """Return whether a worker's sums wait on its device, which has so much memory in all, and so much free.

    A run that begins has no moments yet. So its room is at most the memory that weights, gradient and two moments
    leave, each as large as the gradient.
    """
    return held_bytes <= _LARGEST_PART * min(free_bytes, total_bytes - 4 * gradient_bytes)


@cache
def _tree(count: int) -> frozenset[Span]:
    return frozenset(_spans(0, count))


def _spans(first: int, end: int) -> Iterator[Span]:
    yield first, end
    if end - first > 1:
        middle = (first + end) // 2
        yield from _spans(first, middle)
        yield from _spans(middle, end)
