"""Cards: what GPUs have, by the names that people, CUDA and Ray give them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import ConfigError, nearest


@dataclass(frozen=True)
class Card:
    """memory_bytes: as it is sold; CUDA shows up to 2 % less or more. flops: dense bfloat16, per second, at most.

    None: not known.
    """

    name: str
    memory_bytes: int | None
    flops: float | None


_GB = 10**9

# By the first pattern that a name matches. Source: the datasheets of NVIDIA, of AWS for the A10G
# (https://aws.amazon.com/ec2/instance-types/g5, 70 dense TFLOP/s)
_CARDS = (
    (r"A10G", Card("A10G", 24 * _GB, 70e12)),
    (r"L4", Card("L4", 24 * _GB, 121e12)),
    (r"L40S", Card("L40S", 48 * _GB, 362e12)),
    (r"A100.*40 ?GB?|A100-40G?", Card("A100-40", 40 * _GB, 312e12)),
    (r"A100", Card("A100-80", 80 * _GB, 312e12)),
    (r"H100 PCIe", Card("H100 PCIe", 80 * _GB, 756e12)),
    (r"H100 NVL", Card("H100 NVL", 94 * _GB, 835e12)),
    (r"H100", Card("H100", 80 * _GB, 989e12)),
    (r"H200", Card("H200", 141 * _GB, 989e12)),
    (r"B200", Card("B200", 180 * _GB, 2250e12)),
)
_SLICE = re.compile(r"\bMIG\b")  # a part of a card
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:GB?)?", re.IGNORECASE)

OFFERED = ("A10G", "L4", "A100-40", "L40S", "A100-80", "H100")  # smallest first; as `plan --gpu` knows them


def card_named(name: str) -> Card | None:
    """Return a card by the name that CUDA or Ray's accelerator_type gives it; None if we do not know it.

    Ray says A100 for either size. We take it for the larger one, so as to warn of nothing that may fit.
    """
    if _SLICE.search(name):
        return None
    return next((card for pattern, card in _CARDS if re.search(rf"\b({pattern})(?!\w)", name, re.IGNORECASE)), None)


def card_of(word: str) -> Card:
    """Return the card of --gpu: one of OFFERED, another of CUDA's or Ray's names, or a size such as 24GB.

    Raises:
        ConfigError: it is none of them, or two cards have this name.
    """
    if (size := _SIZE.fullmatch(word)) and (memory_bytes := round(float(size[1]) * _GB)):
        return Card(f"{float(size[1]):g}GB", memory_bytes, None)
    if word.upper() == "A100":
        raise ConfigError(f"gpu={word!r} has 40 or 80 GB: give --gpu=A100-40 or --gpu=A100-80")
    found = next((card for _, card in _CARDS if card.name.lower() == word.lower()), None) or card_named(word)
    if not found:
        names = ", ".join(OFFERED)
        remedy = "for another card give its memory, such as --gpu=24GB"
        raise ConfigError(f"gpu={word!r} is none of {names}{nearest(word, OFFERED)}; {remedy}")
    return found
