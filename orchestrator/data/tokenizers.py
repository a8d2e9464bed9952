"""Tokenizers: text to token ids and back, whole or as a stream.

A tokenizer turns into a small JSON value, so that a checkpoint can carry it; equal values are equal vocabularies. This
module must not know datasets, files of tokens or models; where GPT-2's vocabulary comes from is `gpt2_vocabulary.py`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.file_tokenizer import TOKENIZER_FILE, FileTokenizer
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.token_ids import REPLACEMENT, Tokens, token_dtype, without_surrogates
from orchestrator.data.vocabulary import GPT2_VOCAB_SIZE
from orchestrator.data.word_tokenizer import WordTokenizer
from orchestrator.errors import DataError

GPT2_END_OF_TEXT = 50256
_MAX_CODEPOINT = 0x10FFFF


class StreamDecoder(Protocol):
    """Turns a stream of token ids into text as soon as whole characters are known."""

    def push(self, token: int) -> str:
        """Take one token id and return the text it completes, perhaps none."""

    def finish(self) -> str:
        """Return what an unfinished character at the end decodes to."""


class Tokenizer(Protocol):
    """What training data and samples need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""

    @property
    def end_of_text(self) -> int | None:
        """The token id after which another text begins, None where there is no such token."""

    @property
    def can_be_cut(self) -> bool:
        """Whether a text may be cut between "x\\n" and "y" and encoded in parts, with the same ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> Tokens:
        """Return the token ids (n_tokens,) of a text; a prompt may allow special tokens such as `<|endoftext|>`."""

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of token ids; an id outside the vocabulary (a padded one) becomes U+FFFD."""

    def decoder(self) -> StreamDecoder:
        """Return a decoder that takes one token id at a time."""

    def sizes_bytes(self) -> NDArray[np.int64]:
        """Return the length in UTF-8 of every token id (vocab_size,), 0 of special tokens, which are no text."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `tokenizer_from_json` makes this tokenizer again."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character, numbered in the order of `chars`. Source: nanoGPT, data/shakespeare_char/prepare.py."""

    chars: str

    @classmethod
    def of_text(cls, text: str) -> CharTokenizer:
        """Return the tokenizer that knows exactly the characters of a text, in the order of their code points."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @property
    def end_of_text(self) -> None:
        return None

    @property
    def can_be_cut(self) -> bool:
        return True

    def encode(self, text: str, *, allow_special: bool = False) -> Tokens:  # noqa: ARG002 (there are no special ones)
        """Return one id per character (n_characters,).

        Raises:
            DataError: the text has a character that the tokenizer does not know.
        """
        ids = self._id_of_codepoint[_codepoints(text)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            position = int(unknown[0])
            raise DataError(
                f"the character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not among "
                f"the {self.vocab_size} characters that this tokenizer knows: {self.chars!r}; leave it out, or "
                f"prepare the data with tokenizer gpt2, which encodes any text"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        return "".join(map(self.push, np.asarray(tokens).tolist()))

    def decoder(self) -> StreamDecoder:
        return self  # a character is never split over tokens, so there is nothing to remember

    def sizes_bytes(self) -> NDArray[np.int64]:
        return np.array([len(char.encode("utf-8", "surrogatepass")) for char in self.chars])

    def push(self, token: int) -> str:
        return self.chars[token] if 0 <= token < self.vocab_size else REPLACEMENT

    def finish(self) -> str:
        return ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars}

    @cached_property
    def _id_of_codepoint(self) -> NDArray[np.int32]:
        table = np.full(_MAX_CODEPOINT + 1, -1, dtype=np.int32)
        table[_codepoints(self.chars)] = np.arange(self.vocab_size)
        return table


@dataclass(frozen=True)
class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, as tiktoken computes it."""

    @property
    def vocab_size(self) -> int:
        return GPT2_VOCAB_SIZE

    @property
    def end_of_text(self) -> int:
        return GPT2_END_OF_TEXT

    @property
    def can_be_cut(self) -> bool:
        return True

    def encode(self, text: str, *, allow_special: bool = False) -> Tokens:
        """Return the ids (n_tokens,); `<|endoftext|>` is the end-of-text token only where special ones are allowed.

        Raises:
            DataError: GPT-2's vocabulary cannot be had on this machine.
        """
        special = {"<|endoftext|>"} if allow_special else set()
        # encode_ordinary gives the same ids, through a list of Python integers of 36 bytes each.
        ids: NDArray[np.uint32] = load_gpt2_encoding().encode_to_numpy(
            without_surrogates(text), allowed_special=special, disallowed_special=()
        )
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        stream = self.decoder()
        return "".join(map(stream.push, np.asarray(tokens).tolist())) + stream.finish()

    def decoder(self) -> StreamDecoder:
        return _BytesDecoder()

    def sizes_bytes(self) -> NDArray[np.int64]:
        """Return the length of every token id, 0 of the end of a text.

        Raises:
            DataError: GPT-2's vocabulary cannot be had on this machine.
        """
        encoding = load_gpt2_encoding()
        sizes = [len(encoding.decode_single_token_bytes(token)) for token in range(GPT2_VOCAB_SIZE)]
        sizes[GPT2_END_OF_TEXT] = 0
        return np.array(sizes)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


class _BytesDecoder:
    """Joins the bytes of GPT-2's tokens, which may split a UTF-8 character, into text."""

    def __init__(self) -> None:
        self._encoding = load_gpt2_encoding()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if not 0 <= token < GPT2_VOCAB_SIZE:
            return self.finish() + REPLACEMENT
        return self._utf8.decode(self._encoding.decode_single_token_bytes(token))

    def finish(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def tokenizer_from_json(value: Any, read: Callable[[str], str] | None = None) -> Tokenizer:
    """Return the tokenizer that `to_json` described.

    read: returns the text of a file that travels beside the value, unless it is in it, as `content`. Without both, a
        tokenizer that has one tells what it is and encodes nothing.

    Raises:
        DataError: the value describes no tokenizer known here, or its file is missing, damaged or another one's.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "words" and (words := WordTokenizer.from_json(value)):
        return words
    if kind == "huggingface" and (known := FileTokenizer.from_json(value)):
        content = read(TOKENIZER_FILE) if read else value.get("content")
        return known.with_file(content, TOKENIZER_FILE) if isinstance(content, str) and content else known
    chars = value.get("chars") if kind == "char" else None
    if isinstance(chars, str) and chars and len(set(chars)) == len(chars):
        return CharTokenizer(chars)
    raise DataError(
        f"not a tokenizer: {str(value)[:200]!r}; expected {{'kind': 'gpt2'}} or {{'kind': 'char', 'chars': distinct "
        f"characters}}, or 'words' or 'huggingface' with what belongs to them; was it written by a newer version?"
    )


def _codepoints(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
