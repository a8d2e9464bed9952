"""What a sample begins with: the tokenizer of a model, and a prompt's token ids. Knows nothing of models and draws."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.formats.run_tokenizer import saved_tokenizer
from orchestrator.config import GPT2_NAMES
from orchestrator.data.token_files import read_tokenizer
from orchestrator.data.token_ids import REPLACEMENT
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import GPT2Tokenizer, Tokenizer
from orchestrator.data.vocabulary import GPT2_VOCAB_SIZE
from orchestrator.errors import ConfigError, DataError
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

_MOST_PADDED = 51_200  # to what GPT-2's 50,257 are padded at most: Megatron's, for eight-way tensor parallelism


def tokenizer_of(run_config: dict[str, Any], data_dir: str, folder: RunFolder | None = None) -> Tokenizer:
    """Return the tokenizer that a run's config carries, else that of its dataset, else GPT-2's, as in nanoGPT.

    folder: the run's folder, where a tokenizer's file lies.

    Raises:
        DataError: the dataset's meta tells the size of the vocabulary, but not what the ids mean.
    """
    if saved := saved_tokenizer(run_config, folder, data_dir):
        return saved
    name = str(run_config.get("dataset") or "")
    tokenizer = read_tokenizer(data_dir, name) if name else GPT2Tokenizer()
    if isinstance(tokenizer, GPT2Tokenizer):
        logger.info("tokenizer: GPT-2's (none with the model, no other in %s)", Path(data_dir, name))
    return tokenizer


def folder_tokenizer(source: str, vocab_size: int, fs: Any = None) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder, GPT-2's for GPT-2's names and where the vocabulary is of its size.

    fs: the folder's client.

    Raises:
        DataError: the folder's cannot be read or has more tokens than the model, or it has none and its model is of
            another vocabulary.
    """
    if source in GPT2_NAMES:
        return GPT2Tokenizer()
    if found := read_tokenizer_folder(source, fs):
        if found.vocab_size > vocab_size:
            raise DataError(
                f"the model has vocab_size={vocab_size}, but the tokenizer {found.vocab_size} tokens: the tokenizer in "
                f"{source} is another model's"
            )
        return found
    if not GPT2_VOCAB_SIZE <= vocab_size <= _MOST_PADDED:
        raise DataError(
            f"{source} holds no tokenizer, and vocab_size={vocab_size} is not GPT-2's: put the tokenizer.json of the "
            f"model there"
        )
    logger.info("tokenizer: GPT-2's (none in %s)", source)
    return GPT2Tokenizer()


def encode_prompt(start: str, tokenizer: Tokenizer, *, is_default: bool) -> list[int]:
    """Return the token ids of a prompt, or of the file that `FILE:` names; at least one.

    is_default: nobody has given it, so that where it is not known, another will do.

    Raises:
        ConfigError: the file cannot be read, or the prompt is empty.
        DataError: the tokenizer does not know the prompt.
    """
    prompt = _read_prompt(start)
    try:
        ids = [int(token) for token in tokenizer.encode(prompt, allow_special=True)]
    except DataError as error:
        if not is_default:
            raise DataError(f"start={start!r}: {error}") from None
        ids = []
    if is_default and (not ids or tokenizer.decode(ids) != prompt):
        return _other_prompt(tokenizer)
    if not ids:
        raise DataError(f"start={start!r}: the tokenizer has no token for it; give another prompt")
    return ids


def _other_prompt(tokenizer: Tokenizer) -> list[int]:
    """Return the end of a text, or the first token with a text, for a vocabulary that has no newline."""
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    texts = ((token, tokenizer.decode([token])) for token in (*ends, *range(tokenizer.vocab_size)))
    token, text = next((token, text) for token, text in texts if text not in ("", REPLACEMENT))
    logger.info("the vocabulary has no newline: samples begin with %r (--start gives another)", text)
    return [token]


def _read_prompt(start: str) -> str:
    if not start.startswith("FILE:"):
        text, where = start, "start"
    else:
        where = start.removeprefix("FILE:")
        try:
            text = Path(where).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"start={start!r}: {where} is not a readable text file: {error}") from None
    if not text:
        raise ConfigError(f"{where} is empty: the model needs something to go on from, for instance --start='\\n'")
    return text
