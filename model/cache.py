"""The keys and values of tokens that a GPT has read, so that a new token costs its own pass only.

Must not know what the tokens are for, nor the model beyond its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import GPTConfig


@dataclass
class LayerCache:
    """One layer's keys and values, (B, nh, T_max, hs) each, of which the first `length` positions are filled."""

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, nh, T, hs) of new positions; return views of those of all positions."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class KVCache:
    """All layers' keys and values, allocated once. Fill it with a whole prompt first, then with single tokens."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        n_layer, *rest = shape  # (n_layer, B, nh, T_max, hs)
        memory = torch.empty((n_layer, 2, *rest), dtype=dtype, device=device)
        self.layers = [LayerCache(k, v) for k, v in memory]

    @classmethod
    def empty(cls, config: GPTConfig, batch_size: int, max_tokens: int, weight: Tensor) -> KVCache:
        """Return an empty cache of max_tokens positions for batch_size rows, in the type that the model computes in.

        weight: one of the model's.
        """
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        shape = (config.n_layer, batch_size, config.n_head, max_tokens, config.n_embd // config.n_head)
        return cls(shape, dtype, weight.device)

    @property
    def length(self) -> int:
        """How many positions are filled."""
        return self.layers[0].length

    def check_room(self, n_tokens: int) -> None:
        """Raise ValueError unless n_tokens, a whole prompt or a single token, can be added."""
        room = self.layers[0].k.size(2) - self.length
        if n_tokens > room or (n_tokens > 1 and self.length):
            raise ValueError(
                f"cannot add {n_tokens} tokens to a cache of {self.length} that has room for {room} more: give a whole "
                "prompt to an empty one, then one token at a time"
            )

    def clear(self) -> None:
        """Forget all positions."""
        for layer in self.layers:
            layer.length = 0
