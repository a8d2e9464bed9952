"""Writes a text's token ids to a file, in pieces and on all cores, with the ids of one single encoding.

This module must not know datasets, splits or where the text came from.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1_000_000
_PROGRESS_EVERY_S = 10.0

# A cut that cannot change GPT-2's ids. The pre-tokenizer's only pieces with a newline are runs of white space, and
# the run of one newline between two other characters is a piece of its own whether text follows or not. A longer run
# is not safe: "\n\n" is one piece at the end of a text and two before a letter. Python's \s covers the pattern's.
_SAFE_CUT = re.compile(r"\S\n(?=\S)")


def write_tokens(path: Path, text: str, tokenizer: Tokenizer) -> int:
    """Encode a text into a file of little-endian token ids, force it to disk and return how many there are."""
    n_tokens, last_report_s = 0, time.monotonic()
    pieces = list(chunks(text, CHUNK_CHARACTERS))
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        encoded = pool.map(lambda piece: tokenizer.encode(text[slice(*piece)]), pieces)
        for (_, stop), ids in zip(pieces, encoded, strict=True):
            file.write(ids.tobytes())
            n_tokens += len(ids)
            if time.monotonic() - last_report_s > _PROGRESS_EVERY_S:
                logger.info("%s: encoded %.0f of %.0f million characters", path.name, stop / 1e6, len(text) / 1e6)
                last_report_s = time.monotonic()
        file.flush()
        os.fsync(file.fileno())
    return n_tokens


def chunks(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive pieces of at least `size` characters, cut where no token can span."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + size)
        stop = cut.end() if cut else len(text)
        yield start, stop
        start = stop
