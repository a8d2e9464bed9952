"""A Snapshot as a Hugging Face folder: what `GPT2LMHeadModel.from_pretrained` and other tools for GPT-2 load.

Names and layout are `model/huggingface.py`'s. Nothing here knows a live model; reading is `model/pretrained.py`.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from model import GPTConfig, huggingface_config, to_huggingface, transpose_if_linear
from orchestrator.checkpoint.formats.progress import Progress
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.tensor_file import Layout, bytes_of, layout_of, pieces_of
from orchestrator.data.file_tokenizer import TOKENIZER_FILE, FileTokenizer
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.tokenizer_folder import OUR_FILE
from orchestrator.data.tokenizers import GPT2Tokenizer, Tokenizer
from orchestrator.errors import CheckpointError, DataError
from orchestrator.storage.transfer import atomic_write

logger = logging.getLogger(__name__)


def write_huggingface(
    snapshot: Snapshot,
    folder_or_url: str | Path,
    tokenizer: Tokenizer | None = None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    *,
    storage_options: dict[str, Any] | None = None,
    others: dict[str, bytes] | None = None,
) -> None:
    """Write config.json, generation_config.json, model.safetensors and, where it is known, the tokenizer.

    The model computes the same logits as ours, with its activation. GPT-2's tokenizer becomes vocab.json and
    merges.txt, one of a tokenizer.json that file, for `AutoTokenizer`; one of characters or words a file of ours that
    `sample` understands.
    tensors: the snapshot's model, by name and one at a time; then its own need no content. No model file is delivered
        where the iteration ends with an error. Default: the snapshot's own.
    others: files of another folder to be written as they are, in the place of those made here.

    Raises:
        CheckpointError: the snapshot is no GPT, or a file cannot be written.
    """
    folder = str(folder_or_url).rstrip("/")
    try:
        config = huggingface_config(GPTConfig(**snapshot.model_args))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: model_args do not describe a GPT: {error}") from None
    if isinstance(tokenizer, FileTokenizer):  # which may have 50,256 ids and another end
        config |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    texts = {**_tokenizer_files(tokenizer, config["n_positions"]), "generation_config.json": _json(special)}
    contents = {name: text.encode() for name, text in texts.items()} | (others or {})
    contents["config.json"] = _json(config).encode()
    with atomic_write(model_file := f"{folder}/model.safetensors", storage_options) as scratch_file:
        _write_tensors(scratch_file, snapshot.model, tensors or snapshot.model.items(), model_file)
    for name, content in contents.items():  # config.json comes last: without it, nobody takes the folder for a model
        with atomic_write(f"{folder}/{name}", storage_options) as scratch_file:
            scratch_file.write_bytes(content)


def _write_tensors(path: Path, model: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], title: str) -> None:
    """Write each tensor at its place as it comes, so that no more than one is in memory."""
    layout = _with_metadata(layout_of(to_huggingface({name: tensor.to("meta") for name, tensor in model.items()})))
    missing = model.keys() & layout.spans.keys()
    progress = Progress(f"writing {title}", layout.size_bytes)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, tensor in tensors:
            if name not in layout.spans:  # the tied head
                continue
            missing.remove(name)
            file.seek(layout.spans[name][0])
            for piece in pieces_of(bytes_of(transpose_if_linear(name, tensor.detach().cpu()).contiguous())):
                file.write(piece)
                progress.add(len(piece))
        file.truncate(layout.size_bytes)  # what was not written reads as zeros: the biases that our model lacks
    assert not missing, f"no tensor came for {sorted(missing)[:5]}"


def _with_metadata(layout: Layout) -> Layout:
    """Return the layout with the note by which transformers knows whose tensors they are."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **json.loads(layout.header[8:])}).encode()
    text += b" " * (-len(text) % 8)
    shift = 8 + len(text) - len(layout.header)
    spans = {name: (start + shift, end + shift) for name, (start, end) in layout.spans.items()}
    return Layout(struct.pack("<Q", len(text)) + text, spans)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _tokenizer_files(tokenizer: Tokenizer | None, block_size: int) -> dict[str, str]:
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, FileTokenizer):
        end = {} if tokenizer.end_of_text is None else {"eos_token": tokenizer.decode([tokenizer.end_of_text])}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, **end}
        return {TOKENIZER_FILE: tokenizer.content, "tokenizer_config.json": _json(settings)}
    if not isinstance(tokenizer, GPT2Tokenizer):
        return {OUR_FILE: _json(tokenizer.to_json())}
    try:
        encoding = load_gpt2_encoding()
    except DataError as error:  # the weights are what was asked for
        logger.warning("exported without tokenizer files: %s", error)
        return {}
    end_of_text = "<|endoftext|>"
    words = [encoding.decode_single_token_bytes(token) for token in range(encoding.n_vocab - 1)]
    vocabulary = {_printable(word): token for token, word in enumerate(words)} | {end_of_text: encoding.n_vocab - 1}
    merges = [f"{_printable(left)} {_printable(right)}" for left, right in _merges(words)]
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text)
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": _json(settings),
    }


def _merges(words: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the two halves that each word of more than one byte was merged from, in order of rank."""
    rank = {word: i for i, word in enumerate(words)}
    return [_halves(word, rank) for word in words if len(word) > 1]


def _halves(word: bytes, rank: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merge a word's bytes by the merges before its own, lowest rank first, until two parts are left."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        pairs = [rank.get(left + right, len(rank)) for left, right in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _printable(word: bytes) -> str:
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in word)


def _characters() -> list[str]:
    """Return a visible character for each byte: itself where it is one, else one from U+0100 on.

    Source: OpenAI's GPT-2, src/encoder.py, bytes_to_unicode.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + others.index(byte)) for byte in range(256)]


_CHARACTER_OF_BYTE = _characters()
