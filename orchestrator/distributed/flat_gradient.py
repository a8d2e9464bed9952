"""FlatGradient: all gradients of a model in one tensor, in pieces that are sent while others are still computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

PIECE_BYTES = 25 * 2**20  # at most; DDP's buckets are as large
_ALIGNED = 64  # elements, so that a gradient begins where vector instructions like it


class FlatGradient:
    """flat: the gradients, float32, of which every parameter's `grad` is a view; behind them zeros.

    They lie in the order in which a backward pass comes to them, about: the last layer's first. pieces: of flat, in
    this order; the length of each is a multiple of `multiple_of`.
    """

    def __init__(self, model: nn.Module, multiple_of: int = 1) -> None:
        parameters = [each for each in reversed(list(model.parameters())) if each.requires_grad]
        starts, length = [], 0
        for parameter in parameters:
            starts.append(length)
            length += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        length = -(-length // multiple_of) * multiple_of
        self.flat = torch.zeros(length, dtype=torch.float32, device=parameters[0].device)
        step = max(1, PIECE_BYTES // self.flat.itemsize // multiple_of) * multiple_of
        self.pieces = [slice(start, min(start + step, length)) for start in range(0, length, step)]

        self._is_ready: Callable[[int], None] | None = None
        self._parameters_in = [0] * len(self.pieces)
        self._awaited: list[int] = []
        self._next = 0
        for parameter, start in zip(parameters, starts, strict=True):
            end = start + parameter.numel()
            parameter.grad = self.flat[start:end].view(parameter.shape)
            touched = range(start // step, -(-end // step))
            for piece in touched:
                self._parameters_in[piece] += 1
            parameter.register_post_accumulate_grad_hook(lambda _, touched=touched: self._note(touched))  # type: ignore[no-untyped-call]

    def watch(self, is_ready: Callable[[int], None]) -> None:
        """Call is_ready(piece) for each piece, in order, once the next backward pass is through with it."""
        self._awaited, self._next, self._is_ready = list(self._parameters_in), 0, is_ready

    def end_watch(self) -> None:
        """Tell of the pieces that are left: a parameter in them had no part in this backward pass."""
        self._awaited = [0] * len(self.pieces)
        self._tell()
        self._is_ready = None

    def _note(self, touched: range) -> None:
        if self._is_ready:
            for piece in touched:
                self._awaited[piece] -= 1
            self._tell()

    def _tell(self) -> None:
        while self._is_ready and self._next < len(self.pieces) and self._awaited[self._next] <= 0:
            self._next += 1
            self._is_ready(self._next - 1)
