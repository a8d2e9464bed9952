"""Overlap: the elements that a slice of a saved state and a slice of the live one have in common. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from orchestrator.checkpoint.tensor_slice import TensorSlice


@dataclass(frozen=True, eq=False)
class Overlap:
    """The elements [start, end) of a tensor that is flattened. The ranks that hold `wanted` want them."""

    saved: TensorSlice
    wanted: TensorSlice
    start: int
    end: int

    @cached_property
    def live(self) -> Tensor:
        """Where they go on a rank that wants them; elsewhere, only number and dtype count."""
        if (self.start, self.end) == (self.wanted.offset, self.wanted.end):
            return self.wanted.tensor
        return self.wanted.tensor.view(-1)[self.start - self.wanted.offset : self.end - self.wanted.offset]

    def within(self, content: Tensor) -> Tensor:
        """Return them out of the content of the saved slice."""
        return content.view(-1)[self.start - self.saved.offset : self.end - self.saved.offset]


def overlaps(saved: Iterable[TensorSlice], wanted: dict[str, list[TensorSlice]]) -> Iterator[Overlap]:
    """Yield what every saved slice has in common with the wanted ones of its tensor, in the order of the saved ones."""
    for each in saved:
        for other in wanted[each.name]:
            start, end = max(each.offset, other.offset), min(each.end, other.end)
            if start < end:
                yield Overlap(each, other, start, end)
