"""WordTokenizer: a vocabulary of pieces of any length, as a meta.pkl's `itos` lists them.

It joins what `itos` says and cuts a prompt by the longest entry that fits. What made the token files is not known
here, so nothing is prepared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.token_ids import REPLACEMENT, Tokens, token_dtype
from orchestrator.errors import DataError


@dataclass(frozen=True)
class WordTokenizer:
    """One entry per token id.

    words: the text of every id; None of an id that has none.
    spellings: (text, id) of what a prompt may say besides, or means another id than the first one with that text.
    """

    words: tuple[str | None, ...]
    spellings: tuple[tuple[str, int], ...] = ()

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    @property
    def end_of_text(self) -> int | None:
        return self._id_of.get("<|endoftext|>")

    @property
    def can_be_cut(self) -> bool:
        return False

    def encode(self, text: str, *, allow_special: bool = False) -> Tokens:  # noqa: ARG002 (there are no special ones)
        """Return the ids (n_tokens,), each of the longest entry that the rest of the text begins with.

        Raises:
            DataError: no entry fits somewhere.
        """
        ids: list[int] = []
        position = 0
        while position < len(text):
            word = self._longest_at(text, position)
            ids.append(self._id_of[word])
            position += len(word)
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def _longest_at(self, text: str, position: int) -> str:
        for length in self._lengths:
            if (word := text[position : position + length]) in self._id_of:
                return word
        examples = [word for word in self.words if word][:8]
        raise DataError(
            f"no entry of the vocabulary fits {text[position : position + 20]!r} at position {position}; its "
            f"{self.vocab_size} entries are such as {', '.join(map(repr, examples))}, and are written one after "
            f"the other, as samples print them"
        )

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        return "".join(map(self.push, np.asarray(tokens).tolist()))

    def decoder(self) -> WordTokenizer:
        return self  # every entry is whole text, so there is nothing to remember

    def push(self, token: int) -> str:
        word = self.words[token] if 0 <= token < self.vocab_size else None
        return REPLACEMENT if word is None else word

    def finish(self) -> str:
        return ""

    def sizes_bytes(self) -> NDArray[np.int64]:
        return np.array([len((word or "").encode("utf-8", "surrogatepass")) for word in self.words])

    def to_json(self) -> dict[str, Any]:
        spellings = {"spellings": dict(self.spellings)} if self.spellings else {}
        return {"kind": "words", "words": list(self.words), **spellings}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> WordTokenizer | None:
        """Return the tokenizer that `to_json` described, None where the value is none."""
        words, spellings = value.get("words"), value.get("spellings", {})
        if not isinstance(words, list) or not isinstance(spellings, dict) or not words:
            return None
        are_words = all(word is None or isinstance(word, str) for word in words)
        if not are_words or not all(type(i) is int and 0 <= i < len(words) for i in spellings.values()):
            return None
        return cls(tuple(words), tuple(sorted(spellings.items())))

    @cached_property
    def _id_of(self) -> dict[str, int]:
        first = {word: i for i, word in reversed(list(enumerate(self.words))) if word}
        return first | dict(self.spellings)

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(word) for word in self._id_of if word}, reverse=True)
