"""Whether a model's tokens mean the same as a dataset's. Knows tokenizers by their JSON values only."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

GPT2 = {"kind": "gpt2"}
GPT2_VOCAB_SIZE = 50257
PADDED_GPT2_VOCAB_SIZE = 50304  # to a multiple of 64, for speed, as nanoGPT does without a meta.pkl
_MULTIPLES = (8, 64, 128, 256)  # to which people pad a vocabulary for speed


def difference(model: dict[str, Any] | None, data: dict[str, Any] | None) -> str | None:
    """Return in which way two tokenizers differ, None where they do not or one is not known.

    model, data: what `Tokenizer.to_json` gave.
    """
    if not model or not data or model == data:
        return None
    if model.get("kind") == data.get("kind") == "char":
        return _between_characters(str(model.get("chars")), str(data.get("chars")))
    if model.get("kind") == data.get("kind"):
        return f"the model's tokens and the dataset's are both of kind {name_of(model)}, and not the same"
    return f"the model's tokens are {name_of(model)}, the dataset's {name_of(data)}"


def is_padded(model_size: int, data_size: int) -> bool:
    """Return whether a model's vocabulary is a dataset's, with room up to a round number or without."""
    return any(model_size == -(-data_size // multiple) * multiple for multiple in (1, *_MULTIPLES))


def assumed(vocab_size: int) -> dict[str, Any] | None:
    """Return the tokenizer of a model that carries none, by the size of its vocabulary: GPT-2's or unknown."""
    return GPT2 if vocab_size in (GPT2_VOCAB_SIZE, PADDED_GPT2_VOCAB_SIZE) else None


def _between_characters(model: str, data: str) -> str:
    pairs = enumerate(zip_longest(model, data))
    token, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    sizes = "" if len(model) == len(data) else f" (of {len(model)} characters and of {len(data)})"
    return (
        f"the model's characters are not the dataset's{sizes}: token {token} is {_shown(ours)} to the model, "
        f"{_shown(theirs)} in the dataset"
    )


def _shown(char: str | None) -> str:
    return "nothing" if char is None else f"{char!r}"


def name_of(tokenizer: dict[str, Any]) -> str:
    """Return what messages call a tokenizer."""
    if tokenizer.get("kind") == "gpt2":
        return "GPT-2's"
    if tokenizer.get("kind") == "char":
        return f"{len(str(tokenizer.get('chars')))} characters"
    return str(tokenizer.get("kind"))
