"""The tokenizer of a run: every state tells which one it is, and its file, if any, lies once in the run's folder.

So a run can be sampled and exported on another machine, without its dataset.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.data.file_tokenizer import TOKENIZER_FILE, FileTokenizer
from orchestrator.data.token_files import read_tokenizer
from orchestrator.data.tokenizers import Tokenizer, tokenizer_from_json
from orchestrator.errors import DataError
from orchestrator.storage.run_folder import RunFolder


def keep_tokenizer(folder: RunFolder, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer's file into the run's folder, where it is not there yet.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not isinstance(tokenizer, FileTokenizer):
        return
    content = json.loads(tokenizer.content)
    if folder.read_json(TOKENIZER_FILE) != content:
        folder.write_json(TOKENIZER_FILE, content)


def saved_tokenizer(
    run_config: dict[str, Any], folder: RunFolder | None = None, data_dir: str = ""
) -> Tokenizer | None:
    """Return the tokenizer that a state's config names, with its file; None where it names none.

    The file is the one in the run's folder, else that of its dataset in data_dir.

    Raises:
        DataError: it is in neither, or damaged.
    """
    saved = run_config.get("tokenizer")
    if not saved:
        return None
    tokenizer = tokenizer_from_json(saved)
    if not isinstance(tokenizer, FileTokenizer) or tokenizer.content:
        return tokenizer
    if folder and (content := folder.read_json(TOKENIZER_FILE)):
        return tokenizer.with_file(json.dumps(content), folder.path(TOKENIZER_FILE))
    name = str(run_config.get("dataset") or "")
    if data_dir and name and Path(data_dir, name, TOKENIZER_FILE).is_file():
        its = read_tokenizer(data_dir, name)
        if its == tokenizer:
            return its
    where = f"{folder.path(TOKENIZER_FILE)} is missing or damaged" if folder else "nothing tells where its file lies"
    raise DataError(
        f"the tokenizer is that of a {TOKENIZER_FILE} (SHA-256 {tokenizer.sha256[:12]}...): {where}; put it there, or "
        f"give the --data_dir in which its dataset {name} lies"
    )


def whole_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer's JSON value with its file in it, for a format that is one single file."""
    content = {"content": tokenizer.content} if isinstance(tokenizer, FileTokenizer) else {}
    return {**tokenizer.to_json(), **content}
