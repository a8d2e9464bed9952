"""A Linear layer that is quick for the few rows that sampling gives it on a CPU.

There the time is that of reading the weights once, and a product of few rows is left to a single core by PyTorch's
library (MKL, on AMD's processors). Must not know what the layer is for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOST_ROWS = 8  # from about 16 on the usual product is as quick
_FEWEST_WEIGHTS = 2**19  # smaller ones lie in the processor's cache, and are not waited for
_PARTS = 48  # of the weights, for all cores to work on; measured: fewer are slower with 8 rows, more no quicker


class Linear(nn.Linear):
    """nn.Linear; a large one, without gradients, multiplies up to 8 rows on a CPU in parts: with other rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) for (..., in_features)."""
        n_rows = input.numel() // self.in_features
        if torch.is_grad_enabled() or not 0 < n_rows <= _MOST_ROWS or not _is_large(self.weight, input):
            return super().forward(input)
        x = input.reshape(n_rows, self.in_features)
        n_even = self.out_features - self.out_features % _PARTS
        parts = self.weight[:n_even].view(_PARTS, -1, self.in_features)  # (P, out / P, in)
        if n_rows == 1:  # this way round a quarter quicker than as below
            y = torch.bmm(parts, x.T.expand(_PARTS, -1, -1)).view(1, n_even)
        else:
            y = torch.bmm(x.expand(_PARTS, -1, -1), parts.transpose(1, 2))  # (P, rows, out / P)
            y = y.transpose(0, 1).reshape(n_rows, n_even)
        if n_even < self.out_features:
            y = torch.cat((y, x @ self.weight[n_even:].T), dim=1)
        if self.bias is not None:
            y += self.bias
        return y.view(*input.shape[:-1], self.out_features)


def _is_large(weight: Tensor, input: Tensor) -> bool:
    """Return whether a product of these takes the time of reading weights from memory, in float32 on a CPU."""
    return (
        weight.numel() >= _FEWEST_WEIGHTS
        and weight.is_contiguous()
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
