"""LoRA: a GPT whose own weights are frozen, and that learns two small matrices beside each of some layers.

Such a layer computes y = W x + b + alpha / rank * B A x, where A is (rank, in) and B is (out, rank). B begins at zero,
so the model begins as the one that it was made of. Must not know where weights come from or how they are trained.

Source: https://arxiv.org/abs/2106.09685; names and initial values are those of https://github.com/huggingface/peft
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.linear import Linear

ALL_LINEAR = "all-linear"
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block
BASE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoRAConfig:
    """The settings that fix what adapters compute.

    targets: the layers of every block that have an adapter, as in LAYERS.
    base_dtype: the type in which frozen matrices are held; frozen vectors are float32.
    dropout: of what goes into an adapter, while it is trained.

    Raises:
        ValueError: a rank below 1, an unknown layer or type.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn.c_attn",)
    base_dtype: str = "float32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {self.rank!r}")
        if not self.targets or set(self.targets) - set(LAYERS):
            raise ValueError(f"targets must be some of {', '.join(LAYERS)}, got {', '.join(self.targets) or 'none'}")
        if self.base_dtype not in BASE_DTYPES:
            raise ValueError(f"base_dtype must be one of {', '.join(BASE_DTYPES)}, got {self.base_dtype!r}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def has_adapter(self, layer: str) -> bool:
        """Return whether a layer has one; layer: its full name, `transformer.h.0.attn.c_attn`."""
        return layer.endswith(tuple(f".{target}" for target in self.targets))


def targets_of(words: str) -> tuple[str, ...]:
    """Return the layers that comma-separated words mean: ends of layers' names, or all-linear.

    Raises:
        ValueError: a word means none.
    """
    found: set[str] = set()
    for word in (each.strip() for each in words.split(",")):
        meant = {layer for layer in LAYERS if word == ALL_LINEAR or f".{layer}".endswith(f".{word}")}
        if not word or not meant:
            names = ", ".join(["c_attn", "c_proj", "c_fc", *LAYERS, ALL_LINEAR])
            raise ValueError(f"{word!r} names no layer: give some of {names}")
        found |= meant
    return tuple(layer for layer in LAYERS if layer in found)


class FrozenLinear(Linear):
    """A Linear that is not trained. Its weight may be of another type than its input."""

    def __init__(self, like: Linear, dtype: torch.dtype) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.weight = nn.Parameter(self.weight.to(dtype))
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out) for (..., in), of the input's type or autocast's."""
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _Widened.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Widened(torch.autograd.Function):
    """A product with a weight that is widened to the input's type whenever it is needed, and never kept so."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(input, weight.to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class FrozenEmbedding(nn.Embedding):
    """An Embedding that is not trained, and whose values come out as float32, the type of the residual stream."""

    def __init__(self, like: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., C) for (...) indices."""
        return super().forward(input).float()


class LoRALinear(FrozenLinear):
    """A frozen layer and its adapter, lora_A (rank, in) and lora_B (out, rank), which is float32 and is trained."""

    def __init__(self, like: Linear, lora: LoRAConfig) -> None:
        super().__init__(like, BASE_DTYPES[lora.base_dtype])
        self.lora_A = nn.Parameter(torch.empty(lora.rank, like.in_features))
        self.lora_B = nn.Parameter(torch.empty(like.out_features, lora.rank))
        self.scale, self.dropout = lora.scale, lora.dropout

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out) for (..., in)."""
        low = F.linear(F.dropout(input, self.dropout, self.training), self.lora_A)  # (..., rank)
        return super().forward(input) + self.scale * F.linear(low, self.lora_B)


def freeze(model: nn.Module, lora: LoRAConfig) -> None:
    """Replace a model's layers by frozen ones, some with adapters; all values are still to be filled in."""
    dtype = BASE_DTYPES[lora.base_dtype]
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            frozen: nn.Module = LoRALinear(module, lora) if lora.has_adapter(name) else FrozenLinear(module, dtype)
        elif isinstance(module, nn.Embedding):
            frozen = FrozenEmbedding(module, dtype)
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, frozen)


def init_adapters(model: nn.Module) -> None:
    """Fill adapters with the values with which they begin: A drawn on the CPU from PyTorch's generator, B zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                drawn = torch.empty(module.lora_A.shape)
                module.lora_A.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))
                module.lora_B.zero_()


def adapter_shapes(shapes: dict[str, tuple[int, ...]], lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Return the adapters' parameters, name -> shape, of a model with these parameters (`gpt.parameter_shapes`)."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer != name and lora.has_adapter(layer):
            found[f"{layer}.lora_A"] = (lora.rank, shape[1])
            found[f"{layer}.lora_B"] = (shape[0], lora.rank)
    return found


def merged(name: str, weight: Tensor, adapters: dict[str, Tensor], lora: LoRAConfig) -> Tensor:
    """Return a parameter of the plain GPT that computes the same, float32; weight: the base model's of this name."""
    held = weight.to(BASE_DTYPES[lora.base_dtype]).float() if weight.dim() >= 2 else weight.float()
    layer = name.removesuffix(".weight")
    if layer == name or not lora.has_adapter(layer):
        return held
    return held + lora.scale * (adapters[f"{layer}.lora_B"].float() @ adapters[f"{layer}.lora_A"].float())


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def frozen_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return a model's parameters that are not trained, by name."""
    return {name: parameter.detach() for name, parameter in named if not parameter.requires_grad}
