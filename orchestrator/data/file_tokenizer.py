"""FileTokenizer: the tokenizer that a Hugging Face tokenizer.json describes, as the library tokenizers computes it.

It is data, never code. Its JSON value tells which tokenizer it is; the file travels beside that value, for it may have
megabytes. Where the file lies is not known here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.token_ids import REPLACEMENT, Tokens, token_dtype, without_surrogates
from orchestrator.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
_MOST_HOLES = 100_000  # ids without an entry; models pad their vocabulary, but not by so many
_NO_CHOICE: tuple[Any, ...] = (None, False, "", [], {})  # what an option says that asks for nothing


@dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer that is told apart from others by a hash of what decides its ids.

    content: the text of tokenizer.json; empty where only the JSON value is at hand, and then nothing can be encoded.
    """

    sha256: str
    vocab_size: int
    end_of_text: int | None
    content: str = field(default="", repr=False, compare=False)

    @classmethod
    def of_file(cls, content: str, end_of_text: str | None, path: str) -> FileTokenizer:
        """Return the tokenizer that a tokenizer.json describes; path is for the message.

        end_of_text: the token that ends a text, None where that is not known: then `<|endoftext|>` if there is one.

        Raises:
            DataError: it is damaged.
        """
        value = _parse(content, path)
        entries: dict[str, int] = _loaded(value, path).get_vocab(with_added_tokens=True)
        size = max(entries.values(), default=-1) + 1
        if not 0 < size <= len(entries) + _MOST_HOLES:
            raise DataError(f"{path} is damaged: {len(entries)} entries with ids up to {size - 1:,}")
        end = entries.get(end_of_text if end_of_text is not None else "<|endoftext|>")
        return cls(_identity(value), size, end, content)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FileTokenizer | None:
        """Return the tokenizer that `to_json` described, without its file; None where the value is none."""
        sha256, size, end = value.get("sha256"), value.get("vocab_size"), value.get("end_of_text")
        is_one = isinstance(sha256, str) and type(size) is int and size > 0
        if not is_one or not (end is None or (type(end) is int and 0 <= end < value["vocab_size"])):
            return None
        return cls(value["sha256"], value["vocab_size"], end)

    def with_file(self, content: str, path: str) -> FileTokenizer:
        """Return this tokenizer with its file; path is for the message.

        Raises:
            DataError: the file is damaged, or another tokenizer's.
        """
        value = _parse(content, path)
        _loaded(value, path)
        if _identity(value) != self.sha256:
            raise DataError(
                f"{path} is another tokenizer than the one that the tokens were made with (SHA-256 "
                f"{self.sha256[:12]}...): put that file back, or prepare the data anew"
            )
        return FileTokenizer(self.sha256, self.vocab_size, self.end_of_text, content)

    def encode(self, text: str, *, allow_special: bool = False) -> Tokens:
        """Return the ids (n_tokens,), without any that the tokenizer would put around a text.

        Raises:
            DataError: the tokenizer has no ids for the text, or its file is not at hand.
        """
        tokenizer = self._with_special if allow_special else self._ordinary
        with _library_errors(f"the tokenizer cannot encode {text[:50]!r}: "):
            ids = tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        stream = self.decoder()
        return "".join(map(stream.push, np.asarray(tokens).tolist())) + stream.finish()

    def decoder(self) -> _FileDecoder:
        return _FileDecoder(self._with_special)

    def sizes_bytes(self) -> NDArray[np.int64]:
        """Return the length of every token id, 0 of special tokens.

        Raises:
            DataError: its tokens are not made of bytes, so that their lengths depend on what stands around them.
        """
        value = _parse(self.content, TOKENIZER_FILE)
        if (value.get("decoder") or {}).get("type") != "ByteLevel":
            raise DataError("the lengths of this tokenizer's tokens are not known")
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for word, token in self._with_special.get_vocab(with_added_tokens=True).items():
            sizes[token] = len(word)  # a character stands for a byte
        for added in value.get("added_tokens") or ():
            sizes[added["id"]] = 0 if added.get("special") else len(added["content"].encode())
        return sizes

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether a text may be cut between "x\\n" and "y", and has the same ids: what GPT-2's own pieces allow."""
        value = _parse(self.content, TOKENIZER_FILE)
        pieces = _plain(value.get("pre_tokenizer"))
        added = value.get("added_tokens") or ()
        return (
            pieces == {"type": "ByteLevel", "use_regex": True}
            and not value.get("normalizer")
            and not any(token.get("lstrip") or re.search(r"\s", token["content"]) for token in added)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "huggingface",
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
        }

    @cached_property
    def _with_special(self) -> Any:
        return self._load()

    @cached_property
    def _ordinary(self) -> Any:
        tokenizer = self._load()
        tokenizer.encode_special_tokens = True  # takes `<|endoftext|>` for text like any other
        return tokenizer

    def _load(self) -> Any:
        if not self.content:
            raise DataError(
                f"the {TOKENIZER_FILE} of the tokenizer with SHA-256 {self.sha256[:12]}... is not at hand: it lies in "
                f"the folders of the run and of its dataset"
            )
        return _loaded(_parse(self.content, TOKENIZER_FILE), TOKENIZER_FILE)


class _FileDecoder:
    """Gives text as soon as whole characters are known."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream, self._held = DecodeStream(skip_special_tokens=False), list[int]()

    def push(self, token: int) -> str:
        if token < 0 or self._tokenizer.id_to_token(token) is None:
            return self.finish() + REPLACEMENT
        self._held.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._held.clear()
        return str(text)

    def finish(self) -> str:
        rest = str(self._tokenizer.decode(self._held, skip_special_tokens=False)) if self._held else ""
        self._begin()
        return rest


def _parse(content: str, path: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise DataError(f"{path} is damaged, or no tokenizer: it has no model")
    return value


def _loaded(value: dict[str, Any], path: str) -> Any:
    """Return the library's tokenizer, without what would cut, fill or randomly change a text.

    Raises:
        DataError: the value describes none.
    """
    from tokenizers import Tokenizer

    model = {key: None if key == "dropout" else item for key, item in value["model"].items()}
    with _library_errors(f"{path} is damaged: "):
        return Tokenizer.from_str(json.dumps({**value, "model": model, "truncation": None, "padding": None}))


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Raise an error of the tokenizers library as a DataError that begins with `what`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare ones, and a panic in it is not even an Exception
        raise DataError(f"{what}{str(error)[:200]}") from None


def _identity(value: dict[str, Any]) -> str:
    """Return a hash of what decides ids and texts, whichever version of the library wrote the file."""
    model = {key: item for key, item in value["model"].items() if item not in _NO_CHOICE and key != "dropout"}
    added = [
        {
            key: token.get(key)
            for key in ("id", "content", "special", "lstrip", "rstrip", "single_word")
            if token.get(key)
        }
        for token in value.get("added_tokens") or ()
    ]
    names = {token.get("content") for token in added}
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = sorted((item, word) for word, item in model["vocab"].items() if word not in names)
    if isinstance(model.get("merges"), list):
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    parts = {key: _plain(value.get(key)) for key in ("normalizer", "pre_tokenizer", "decoder")}
    if isinstance(parts["decoder"], dict) and parts["decoder"].get("type") == "ByteLevel":
        parts["decoder"] = {"type": "ByteLevel"}  # its options say nothing about decoding
    text = json.dumps([model, sorted(added, key=lambda token: token.get("id", 0)), parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(part: Any) -> Any:
    """Return a part of a tokenizer.json without options that say what their absence says."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {key: _plain(item) for key, item in part.items() if item not in _NO_CHOICE and key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept["use_regex"] = part.get("use_regex", True)
    return kept
