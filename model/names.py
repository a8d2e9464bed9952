"""The names of a GPT's parameters, and the names that wrappers make of them. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # one tensor under two names
POSITIONS = "transformer.wpe.weight"
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that some files store as if they were weights

# What DDP and DataParallel put before a name, and what torch.compile, DeepSpeed, FSDP and checkpointing put anywhere.
_OUTERMOST = "module"
_WRAPPERS = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def without_wrappers(name: str) -> str:
    """Return a parameter's name without what wrappers have put around it, in any mix and number."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _OUTERMOST:
        parts = parts[1:]
    return ".".join(parts)


def renamed(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return new name -> old name of (old, new) pairs.

    Raises:
        ValueError: two become one.
    """
    found: dict[str, str] = {}
    for old, new in names:
        if new in found:
            raise ValueError(f"{found[new]} and {old} are both {new}: which of them counts cannot be told")
        found[new] = old
    return found


def differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], limit: int = 5) -> str:
    """Return which tensors are missing, unexpected or of another shape, nothing where none is."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    faults += [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    more = f" and {len(faults) - limit} more" if len(faults) > limit else ""
    return "; ".join(faults[:limit]) + more
