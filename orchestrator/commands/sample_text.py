"""Shows samples as they are drawn. Knows tokens and text, nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from orchestrator.data.tokenizers import Tokenizer

SEPARATOR = "---------------"


class Texts:
    """Shows samples that are drawn side by side, one after the other."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], n_samples: int, end: int | None, out: TextIO) -> None:
        self.out, self.end = out, end
        self.decoders = [tokenizer.decoder() for _ in range(n_samples)]
        self.hidden = ["".join(map(decoder.push, ids)) for decoder in self.decoders]  # decoded, but not shown yet
        self.is_over = [False] * n_samples
        self.current = 0  # the sample that is shown as it grows
        self._show()

    def push(self, tokens: Sequence[int]) -> None:
        """Take the next token of each sample."""
        for row, token in enumerate(tokens):
            if token == self.end:
                self._end(row)
            elif not self.is_over[row]:
                self.hidden[row] += self.decoders[row].push(token)
        self._show()

    def finish(self) -> None:
        """Show what is left: no more tokens will come."""
        for row in range(len(self.decoders)):
            self._end(row)
        self._show()

    def _end(self, row: int) -> None:
        if not self.is_over[row]:
            self.is_over[row] = True
            self.hidden[row] += f"{self.decoders[row].finish()}\n{SEPARATOR}\n"

    def _show(self) -> None:
        for row in range(self.current, len(self.decoders)):
            print_text(self.out, self.hidden[row])
            self.hidden[row] = ""
            if not self.is_over[row]:
                break
            self.current = row + 1


def print_text(out: TextIO, text: str) -> None:
    """Write text and have it seen at once."""
    encoding = out.encoding or "utf-8"  # a terminal that lacks a character shows a question mark
    out.write(text.encode(encoding, "replace").decode(encoding))
    out.flush()
