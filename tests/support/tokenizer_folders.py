"""Hugging Face tokenizers that are trained in milliseconds, and folders and datasets with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from orchestrator.data.file_tokenizer import FileTokenizer
from orchestrator.data.prepare import PrepareConfig, prepare
from orchestrator.data.tokenizer_folder import read_tokenizer_folder

TEXT = "the quick brown fox jumps over the lazy dog, and the dog doesn't mind\n" * 40
MIXED = "the quick ☃ wörld\n\n 日本 \U0001f680 don't\t\n"
END = "<|endoftext|>"


def byte_level(text: str = TEXT, end: str = END, **options: Any) -> Tokenizer:
    """Train a byte-level BPE, which knows any text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    return made


def folder_of(path: Path, made: Tokenizer | None = None, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (made or byte_level()).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | settings))
    return path


def read(folder: Path | str) -> FileTokenizer:
    found = read_tokenizer_folder(str(folder))
    assert isinstance(found, FileTokenizer)
    return found


def whole_words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def prepared(folder: Path, tmp_path: Path, **settings: Any) -> Any:
    (tmp_path / "text.txt").write_text(TEXT)
    return prepare(
        PrepareConfig("mine", (str(tmp_path / "text.txt"),), str(folder), str(tmp_path / "data"), **settings)
    )
