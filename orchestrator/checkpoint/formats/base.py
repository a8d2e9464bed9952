"""The base model of adapters as it is held in memory, and its checksum. Knows no source and no live model."""

from __future__ import annotations

from collections.abc import Mapping

import xxhash
from torch import Tensor

from model.lora import BASE_DTYPES
from model.names import POSITIONS


def held(tensor: Tensor, base_dtype: str) -> Tensor:
    """Return a frozen weight in the type in which it is held: a matrix in base_dtype, a vector in float32."""
    wide = tensor.float()
    return wide.to(BASE_DTYPES[base_dtype]) if tensor.dim() >= 2 else wide


def base_checksum(per_tensor: Mapping[str, str]) -> str:
    """Return one checksum of a base model.

    per_tensor: a plain GPT's parameters, the tied head left out -> `tensor_file.checksum` of each as it is held, the
        positions cut to block_size.
    """
    lines = "".join(f"{name}:{per_tensor[name]}\n" for name in sorted(per_tensor))
    return xxhash.xxh3_128_hexdigest(lines.encode())


def cropped(name: str, tensor: Tensor, block_size: int) -> Tensor:
    """Return a parameter of a model with block_size positions: a view of the first ones, if it is their table."""
    return tensor[:block_size] if name.endswith(POSITIONS) else tensor
