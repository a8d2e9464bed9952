"""The types of token ids, which all tokenizers share. Knows no tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16] | NDArray[np.uint32]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an id without a text decodes to


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest little-endian type for the ids: uint16, or uint32 above 65,536."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def without_surrogates(text: str) -> str:
    """Return the text with U+FFFD for lone surrogates, as of undecodable bytes on a command line: they are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
