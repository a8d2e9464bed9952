"""The base model of adapters: its values as they are held in memory, their checksum, and what both are together.

Knows no source (`weights.py`) and no live model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import xxhash
from torch import Tensor

from model import parameter_shapes
from model.lora import BASE_DTYPES, adapter_shapes, merged
from model.names import POSITIONS, differences
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.tensor_file import checksum
from orchestrator.errors import CheckpointError

OTHER_CHECKSUM = "its checksum differs from the one in the run's state"


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
    """Return a parameter, or a moment of it, of a model with block_size positions: their table is cut, if it is longer.

    A shorter table is a copy, since a view would keep the whole one in memory.
    """
    return tensor[:block_size].clone() if name.endswith(POSITIONS) and len(tensor) > block_size else tensor


def another_base(where: str, why: str) -> CheckpointError:
    """Return the error that a model is not the one beside which adapters were trained."""
    return CheckpointError(
        f"{where} is not the base model that these adapters were trained beside: {why}. Give --lora_base=PATH, where "
        "the right one lies"
    )


def check_adapters_fit(adapters: Snapshot, title: str) -> None:
    """Check that adapters have the layers and shapes of their model_args.

    Raises:
        CheckpointError: they have not.
    """
    assert adapters.adapters
    expected = adapter_shapes(parameter_shapes(adapters.model_args), adapters.adapters.lora)
    if faults := differences(expected, {name: tuple(tensor.shape) for name, tensor in adapters.model.items()}):
        lacks = expected.keys() - adapters.model.keys()
        hint = ". Here adapters are on the same layers of every block" if lacks else ""
        raise CheckpointError(f"{title}: its tensors do not fit its settings and its base model: {faults}{hint}")


def merged_outline(adapters: Snapshot) -> Snapshot:
    """Return the plain model that adapters and their base are together, without content."""
    model = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(adapters.model_args).items()}
    return replace(adapters, model=model, optimizer={}, param_groups=(), scaler={}, adapters=None)


def merged_tensors(
    adapters: Snapshot, base: Snapshot, tensors: Iterable[tuple[str, Tensor]], where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of that plain model, float32, as the base's tensors come.

    base: an outline of the base model. where: what messages call it. Whether it is the right one is known at the end.

    Raises:
        CheckpointError: it is another model than the one beside which the adapters were trained.
    """
    assert adapters.adapters
    lora, expected = adapters.adapters.lora, adapters.adapters.base.checksum
    block_size = adapters.model_args["block_size"]
    shapes = {name: tuple(cropped(name, tensor, block_size).shape) for name, tensor in base.model.items()}
    if faults := differences(parameter_shapes(adapters.model_args), shapes):
        raise another_base(where, faults)
    found: dict[str, str] = {}
    for name, tensor in tensors:
        whole = cropped(name, tensor, block_size)
        if expected:
            found[name] = checksum(held(whole, lora.base_dtype))
        yield name, merged(name, whole, adapters.model, lora)
    if expected and base_checksum(found) != expected:
        raise another_base(where, OTHER_CHECKSUM)
