"""How much a worker computes: FLOP/s that go into the model, and nanoGPT's MFU, their share of what its card can do.

Must not know how a model counts its FLOPs, nor who shows them.
"""

from __future__ import annotations

import torch

from orchestrator.capacity.cards import card_named


def peak_flops(card: str) -> float | None:
    """Return a card's FLOP/s at most, by the name that CUDA gives it, None where they are not known."""
    found = card_named(card)
    return found.flops if found else None


class Flops:
    """A running average, as nanoGPT's. On a CPU we have nothing to compare it with, and do not know it.

    mfu: model FLOPs utilisation, 1.0 is the card's peak; tflops: TFLOP/s of this GPU. None each while it is not known.
    """

    mfu: float | None = None
    tflops: float | None = None

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if self._is_on_gpu else None
        self._per_s: float | None = None

    def add(self, per_s: float) -> None:
        """Take in the FLOP/s of an iteration."""
        self._per_s = per_s if self._per_s is None else 0.9 * self._per_s + 0.1 * per_s
        self.mfu = self._per_s / self._peak if self._peak else None
        self.tflops = self._per_s / 1e12 if self._is_on_gpu else None
