"""Numbers that are none: NaN and infinity in tensors that come from elsewhere. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from orchestrator.errors import CheckpointError


def count_not_finite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite; one quick pass where none is."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0
    low, high = torch.aminmax(tensor)  # NaN if there is any
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def all_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> Iterator[tuple[str, Tensor]]:
    """Pass on named tensors, and look at each; what is wrong is told at the end, once all are known to be whole.

    Raises:
        CheckpointError: after the last one, naming the first that holds what is no number.
    """
    first = ""
    for name, tensor in tensors:
        if not first and (count := count_not_finite(tensor)):
            first = not_finite(source, name, count, tensor.numel())
        yield name, tensor
    if first:
        raise CheckpointError(first)


def not_finite(source: str, name: str, count: int, numel: int) -> str:
    """Return what is said of a tensor with values that are no numbers."""
    return (
        f"{source}: {name} has {count:,} of {numel:,} values that are not finite (NaN or infinity): the file is "
        "damaged, or its training had diverged; take another copy or an older state"
    )
