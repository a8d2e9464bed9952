"""Reads the tokenizer of a Hugging Face folder, a path or an fsspec URL: data only, never the folder's code.

Where its ids are GPT-2's, it is GPT-2's tokenizer. This module must not know weights.
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from typing import Any

from orchestrator.data.file_tokenizer import TOKENIZER_FILE, FileTokenizer
from orchestrator.data.tokenizers import GPT2_END_OF_TEXT, GPT2Tokenizer, Tokenizer, tokenizer_from_json
from orchestrator.errors import CheckpointError, DataError
from orchestrator.storage.location import locate
from orchestrator.storage.reasons import translated

logger = logging.getLogger(__name__)

OUR_FILE = "char_tokenizer.json"  # ours: transformers has no tokenizer of single characters, or of words alone
# FileTokenizer's hash of GPT-2's own tokenizer.json, which tests compute from its vocabulary.
GPT2_SHA256 = "4171692f9c23cb443f6007baf3dca97ab09beb48be90abfb3fe2a47f04818e37"
_OF_LIBRARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "tekken.json")
_LOOKED_FOR = (
    *(OUR_FILE, TOKENIZER_FILE, "vocab.json", "merges.txt", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "meta.json", *_OF_LIBRARIES),
)
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_REMEDY = (
    "open it with transformers' AutoTokenizer on a machine where you trust its code, and save_pretrained to a folder: "
    "that writes tokenizer.json"
)


class TokenizerFolder:
    """The files of one folder."""

    def __init__(self, folder_or_url: str, fs: Any = None) -> None:
        self.url = folder_or_url.rstrip("/")
        try:
            self._fs, root = (fs, fs._strip_protocol(self.url)) if fs else locate(self.url)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        self._root = str(root)

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    @cached_property
    def names(self) -> set[str]:
        """The names of what lies there, none where there is no such folder."""
        with translated(f"{self.url} cannot be read", DataError):
            try:
                return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)}
            except (FileNotFoundError, NotADirectoryError, PermissionError):  # web servers list nothing
                return {name for name in _LOOKED_FOR if self._fs.exists(f"{self._root.rstrip('/')}/{name}")}

    def text(self, name: str) -> str:
        with translated(f"{self.path(name)} cannot be read", DataError):
            content = bytes(self._fs.cat_file(f"{self._root.rstrip('/')}/{name}"))
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path(name)} is damaged: {error}") from None

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.text(name))
        except ValueError as error:
            raise DataError(f"{self.path(name)} is damaged: {error}") from None

    def settings(self, name: str) -> dict[str, Any]:
        """Return what a file of settings says, {} where it is not there."""
        value = self.json(name) if name in self.names else {}
        if not isinstance(value, dict):
            raise DataError(f"{self.path(name)} is damaged: it holds no settings")
        return value


def read_tokenizer_folder(folder_or_url: str, fs: Any = None) -> Tokenizer | None:
    """Return the tokenizer that a folder holds, None where it holds none. fs: its fsspec client, if it is open.

    Raises:
        DataError: its files are damaged, or of a kind that cannot be read without running somebody's code.
    """
    folder = TokenizerFolder(folder_or_url, fs)
    names = folder.names
    if OUR_FILE in names:
        return tokenizer_from_json(folder.json(OUR_FILE))
    if (its := folder.settings("meta.json").get("tokenizer")) is not None:  # a dataset that `prepare` made
        return tokenizer_from_json(its, folder.text)
    settings = folder.settings("tokenizer_config.json")
    if TOKENIZER_FILE in names:
        if "auto_map" in settings:
            logger.info("%s: its own code is not run, its tokenizer.json is read", folder.url)
        end = _end_of_text(settings, folder)
        return _known(FileTokenizer.of_file(folder.text(TOKENIZER_FILE), end, folder.path(TOKENIZER_FILE)))
    if "vocab.json" in names and "merges.txt" in names:
        return _known(_of_merges(folder, settings))
    _refuse_others(folder, names, settings)
    return None


def _known(tokenizer: FileTokenizer) -> Tokenizer:
    is_gpt2 = tokenizer.sha256 == GPT2_SHA256 and tokenizer.end_of_text == GPT2_END_OF_TEXT
    return GPT2Tokenizer() if is_gpt2 else tokenizer


def _end_of_text(settings: dict[str, Any], folder: TokenizerFolder) -> str | None:
    token = settings.get("eos_token") or folder.settings("special_tokens_map.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _of_merges(folder: TokenizerFolder, settings: dict[str, Any]) -> FileTokenizer:
    """Return the tokenizer of GPT-2's kind that vocab.json and merges.txt describe.

    Raises:
        DataError: a file is damaged, or the folder says that they are another kind's.
    """
    if settings.get("tokenizer_class") not in _GPT2_CLASSES:
        raise DataError(
            f"{folder.url}: vocab.json and merges.txt of a {settings['tokenizer_class']} are not read, only GPT-2's "
            f"kind: {_REMEDY}"
        )
    vocabulary = folder.json("vocab.json")
    if not isinstance(vocabulary, dict) or not all(type(token) is int for token in vocabulary.values()):
        raise DataError(f"{folder.path('vocab.json')} is damaged: it must map words to ids")
    lines = folder.text("merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in merges):
        raise DataError(f"{folder.path('merges.txt')} is damaged: a line must name two parts")
    end = _end_of_text(settings, folder) or "<|endoftext|>"
    content = _byte_level(vocabulary, merges, _added(folder, vocabulary, end), settings)
    return FileTokenizer.of_file(content, end, f"{folder.url}: vocab.json or merges.txt")


def _added(folder: TokenizerFolder, vocabulary: dict[str, int], end: str) -> list[dict[str, Any]]:
    """Return the tokens that are no pieces of text: the end of a text, and what the folder adds."""
    more = folder.settings("added_tokens.json")
    ids = {
        word: token for word, token in {**more, end: vocabulary.get(end, more.get(end))}.items() if token is not None
    }
    if not all(type(token) is int and token >= 0 for token in ids.values()):
        raise DataError(f"{folder.path('added_tokens.json')} is damaged: it must map words to ids")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": token, "content": word, "special": True, **plain} for word, token in ids.items()]


def _byte_level(
    vocabulary: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]], settings: dict[str, Any]
) -> str:
    bytes_of = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": None,
            "pre_tokenizer": {**bytes_of, "add_prefix_space": bool(settings.get("add_prefix_space", False))},
            "post_processor": None,
            "decoder": {**bytes_of, "add_prefix_space": True},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        }
    )


def _refuse_others(folder: TokenizerFolder, names: set[str], settings: dict[str, Any]) -> None:
    """Refuse a folder whose tokenizer is there and is not read.

    Raises:
        DataError: naming what is there.
    """
    half = {"vocab.json", "merges.txt"} & names
    if half:
        missing = ({"vocab.json", "merges.txt"} - half).pop()
        raise DataError(f"{folder.url} has {half.pop()} and no {missing}: both make a tokenizer")
    others = sorted(name for name in names if name in _OF_LIBRARIES or name.endswith(".tiktoken"))
    others += sorted(name for name in names if name.startswith("tokenization_") and name.endswith(".py"))
    others += ["tokenizer_config.json with code of its own"] if "auto_map" in settings else []
    if others:
        raise DataError(
            f"{folder.url}: its tokenizer ({', '.join(others)}) cannot be read without running code: {_REMEDY}"
        )
