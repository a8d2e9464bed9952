"""A Linear layer that is quick for the few rows that sampling gives it on a CPU.

There the time is that of reading the weights once. PyTorch's usual library (MKL) does not reach that, on AMD's
processors least: it leaves a product of few rows to a single core. For one row a product in parts comes near it, for
more the other library that PyTorch brings (oneDNN), nearest if it has a copy of the weights in an order of its own.
Must not know what the layer is for.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_MOST_ROWS = 32  # measured: twice as quick up to here
_MOST_COPIED_BYTES = 2**31  # beyond, memory is worth more than a quarter of the time
_FEWEST_WEIGHTS = 2**19  # smaller ones lie in the processor's cache, and are not waited for
_PARTS = 48  # of the weights, for all cores to work on; measured: more are no quicker


class Linear(nn.Linear):
    """nn.Linear; a large one, without gradients, multiplies up to 32 rows on a CPU another way: with other rounding."""

    copy: Tensor | None = None  # of the weights, in oneDNN's order

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) for (..., in_features)."""
        n_rows = input.numel() // self.in_features
        if torch.is_grad_enabled() or not 0 < n_rows <= _MOST_ROWS or not _is_large(self.weight, input):
            return super().forward(input)
        if n_rows == 1:
            return self._in_parts(input)
        if torch.compiler.is_compiling() or not has_onednn():  # the compiler chooses by itself
            return super().forward(input)
        weight = self.weight if self.copy is None else self.copy
        return torch.ops.mkldnn._linear_pointwise(input, weight, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def _in_parts(self, input: Tensor) -> Tensor:
        """Multiply one row, on all cores."""
        x = input.reshape(1, self.in_features).T  # its strides decide: five times slower as .reshape(in_features, 1)
        n_even = self.out_features - self.out_features % _PARTS
        parts = self.weight[:n_even].view(_PARTS, -1, self.in_features)  # (P, out / P, in)
        y = torch.bmm(parts, x.expand(_PARTS, -1, -1)).view(n_even)
        if n_even < self.out_features:
            y = torch.cat((y, self.weight[n_even:] @ x.flatten()))
        if self.bias is not None:
            y += self.bias
        return y.view(*input.shape[:-1], self.out_features)


class Copies:
    """Copies of the large ones of a model's layers, in oneDNN's order, for many products of n_rows rows.

    They are used within a `with`, in which nothing is trained. There are none for one row, nor of a model so large that
    they would be missed.
    """

    def __init__(self, layers: Iterable[nn.Module], n_rows: int) -> None:
        large = [m for m in layers if isinstance(m, Linear) and _is_large(m.weight, m.weight)]
        fits = sum(layer.weight.nbytes for layer in large) <= _MOST_COPIED_BYTES
        pays = fits and 1 < n_rows <= _MOST_ROWS and has_onednn()
        self._copies = [(layer, _reordered(layer.weight, n_rows)) for layer in large if pays]

    def __enter__(self) -> None:
        for layer, copy in self._copies:
            layer.copy = copy

    def __exit__(self, *_: Any) -> None:
        for layer, _copy in self._copies:
            layer.copy = None


def _reordered(weight: Tensor, n_rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), n_rows)  # type: ignore[no-any-return]


@cache
def has_onednn() -> bool:
    """Return whether this PyTorch has the operators that its compiler uses for a linear layer; no page describes them.

    The public way to oneDNN takes copies alone, and slower ones.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ops = torch.ops.mkldnn
    return available and hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")


def _is_large(weight: Tensor, input: Tensor) -> bool:
    """Return whether a product of these takes the time of reading weights from memory, in float32 on a CPU."""
    return (
        weight.numel() >= _FEWEST_WEIGHTS
        and weight.is_contiguous()
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
