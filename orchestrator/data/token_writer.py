"""Writes texts' token ids to a file, in pieces and on all cores, with the ids of one single encoding.

This module must not know datasets, splits or where the text came from.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from orchestrator.data.token_ids import Tokens, token_dtype
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.host.machine import usable_cpus

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1_000_000
_PROGRESS_EVERY_S = 10.0

# A cut that cannot change GPT-2's ids. The pre-tokenizer's only pieces with a newline are runs of white space, and
# the run of one newline between two other characters is a piece of its own whether text follows or not. A longer run
# is not safe: "\n\n" is one piece at the end of a text and two before a letter. Python's \s covers the pattern's.
# An end of text has no white space in it, and what stands before and behind it is encoded by itself in any case.
_SAFE_CUT = re.compile(r"\S\n(?=\S)")


def write_tokens(path: Path, text: str, tokenizer: Tokenizer, end_of_text: str = "") -> int:
    """Encode a text into a file of little-endian token ids, force it to disk and return how many there are.

    end_of_text: becomes the end-of-text token wherever the text has it; empty: then it is text like any other.
    """
    pieces = list(_pieces(text, tokenizer, end_of_text))
    with _Writer(path, len(text)) as writer, ThreadPoolExecutor(usable_cpus()) as pool:
        encoded = pool.map(lambda piece: encode(text[slice(*piece)], tokenizer, end_of_text), pieces)
        for (_, stop), ids in zip(pieces, encoded, strict=True):
            writer.write(ids, stop)
    return writer.n_tokens


def write_documents(
    path: Path, batches: Iterable[Sequence[str]], n: int, tokenizer: Tokenizer, end_of_text: str = ""
) -> int:
    """Encode n documents, each with the end-of-text token after it, as `write_tokens` does a text.

    batches: of documents, in order.
    """
    end = np.array([tokenizer.end_of_text], dtype=token_dtype(tokenizer.vocab_size))
    done = 0
    with _Writer(path, n, "documents", 1) as writer, ThreadPoolExecutor(usable_cpus()) as pool:
        for batch in batches:
            done += len(batch)
            ids = pool.map(lambda document: encode(document, tokenizer, end_of_text), batch)
            writer.write(np.concatenate([part for one in ids for part in (one, end)]), done)
    return writer.n_tokens


def encode(text: str, tokenizer: Tokenizer, end_of_text: str = "") -> Tokens:
    """Return the ids (n_tokens,) of a text, in which end_of_text, unless it is empty, is the end-of-text token."""
    if not end_of_text or end_of_text not in text:
        return tokenizer.encode(text)
    end = np.array([tokenizer.end_of_text], dtype=token_dtype(tokenizer.vocab_size))
    first, *others = (tokenizer.encode(part) for part in text.split(end_of_text))
    return np.concatenate([first, *(part for other in others for part in (end, other))])


class _Writer:
    """A file of tokens that tells every ten seconds how far it is."""

    def __init__(self, path: Path, n_units: int, unit: str = "million characters", size: float = 1e6) -> None:
        self.n_tokens = 0
        self._file, self._title = path.open("wb"), path.name
        self._n_units, self._unit, self._size = n_units, unit, size
        self._last_report_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, ids: Tokens, n_done: int) -> None:
        self._file.write(ids.tobytes())
        self.n_tokens += len(ids)
        if time.monotonic() - self._last_report_s > _PROGRESS_EVERY_S:
            done, whole = n_done / self._size, self._n_units / self._size
            logger.info("%s: encoded %.0f of %.0f %s", self._title, done, whole, self._unit)
            self._last_report_s = time.monotonic()


def _pieces(text: str, tokenizer: Tokenizer, end_of_text: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of pieces with the ids that they have in the whole text, as small as that allows."""
    if tokenizer.can_be_cut:
        yield from chunks(text, CHUNK_CHARACTERS)
        return
    start = 0
    while end_of_text and (found := text.find(end_of_text, start + CHUNK_CHARACTERS)) >= 0:
        yield start, found + len(end_of_text)
        start = found + len(end_of_text)
    if start < len(text):
        yield start, len(text)


def chunks(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive pieces of at least `size` characters, cut where no token can span."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + size)
        stop = cut.end() if cut else len(text)
        yield start, stop
        start = stop
