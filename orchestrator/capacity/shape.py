"""ModelShape: how many values a GPT and its adapters have, and how much they compute. Knows no bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config import TrainConfig

LAYERS = {  # of a block: (in, out) in widths
    "attn.c_attn": (1, 3),
    "attn.c_proj": (1, 1),
    "mlp.c_fc": (1, 4),
    "mlp.c_proj": (4, 1),
}
ALL_LINEAR = "all-linear"
GPT2_SIZES = {  # n_layer, n_head, n_embd; model/pretrained.py has them too, and needs PyTorch
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
GPT2_BLOCK_SIZE = 1024


def targets_of(words: str) -> tuple[str, ...]:
    """Return the layers of a block that `lora_targets` names: ends of their names, or all-linear."""
    named = [word.strip() for word in words.split(",")]
    return tuple(
        layer for layer in LAYERS if any(word == ALL_LINEAR or f".{layer}".endswith(f".{word}") for word in named)
    )


@dataclass(frozen=True)
class ModelShape:
    """GPTConfig's sizes, and the adapters; rank 0: no adapters, all weights are trained.

    block_size: positions that the model keeps, after it is cut to the settings' block_size.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    rank: int = 0
    targets: tuple[str, ...] = ()

    @property
    def block_matrices(self) -> int:
        """Values in the matrices of one block."""
        return 12 * self.n_embd**2

    @property
    def block_biases(self) -> int:
        """Values in the biases of one block's linear layers."""
        return 9 * self.n_embd if self.bias else 0

    @property
    def embedding(self) -> int:
        """Values in the token embedding, which is the head's matrix as well."""
        return self.vocab_size * self.n_embd

    @property
    def matrices(self) -> int:
        """Values in all matrices and embeddings."""
        return self.n_layer * self.block_matrices + self.embedding + self.block_size * self.n_embd

    @property
    def vectors(self) -> int:
        """Values in biases and LayerNorms."""
        norms = (2 * self.n_layer + 1) * self.n_embd * (2 if self.bias else 1)
        return norms + self.n_layer * self.block_biases

    @property
    def base_params(self) -> int:
        """Parameters of the GPT without adapters."""
        return self.matrices + self.vectors

    @property
    def adapter_params(self) -> int:
        """Values in all adapters."""
        widths = sum(sum(LAYERS[layer]) for layer in self.targets)
        return self.n_layer * self.rank * widths * self.n_embd if self.rank else 0

    @property
    def trained_params(self) -> int:
        """Parameters with gradients and moments."""
        return self.adapter_params if self.rank else self.base_params

    def flops_per_token(self, *, recompute: bool = False, recompute_head: bool = False) -> float:
        """Return the floating-point operations of forward and backward, what is computed twice included.

        A frozen matrix has no gradient of its own: 4 operations for each value instead of 6.

        Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311
        """
        attention = 4 * self.n_layer * self.n_embd * self.block_size  # forward
        blocks = 2 * self.n_layer * self.block_matrices + attention
        head = 2 * self.embedding
        backward = 1 if self.rank else 2
        total = (1 + backward) * (blocks + head) + 6 * self.adapter_params
        if self.rank:
            total += attention  # which has no matrix to freeze
        return total + (blocks if recompute else 0) + (head if recompute_head else 0)


def shape_of(config: TrainConfig, model_args: dict[str, Any]) -> ModelShape:
    """Return the sizes of the model that is trained: GPTConfig's arguments, cut and frozen as the settings say."""
    keys = ("n_layer", "n_head", "n_embd", "vocab_size", "bias")
    plain = ModelShape(**{key: model_args[key] for key in keys}, block_size=config.block_size)
    return with_adapters(plain, config)


def with_adapters(shape: ModelShape, config: TrainConfig) -> ModelShape:
    """Return a model with the adapters that the settings ask for."""
    rank = config.lora_rank
    return replace(shape, rank=rank, targets=targets_of(config.lora_targets) if rank else ())
