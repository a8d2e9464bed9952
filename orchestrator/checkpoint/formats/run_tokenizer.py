"""The tokenizer of a run: every state tells which one it is, and its file, if any, lies once in the run's folder.

So a run can be sampled and exported on another machine, without its dataset.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.data.file_tokenizer import TOKENIZER_FILE, FileTokenizer
from orchestrator.data.token_files import read_tokenizer
from orchestrator.data.tokenizers import Tokenizer, tokenizer_from_json
from orchestrator.errors import DataError


def keep_tokenizer(store: CheckpointStore, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer's file into the run's folder, where it is not there yet.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not isinstance(tokenizer, FileTokenizer):
        return
    content = json.loads(tokenizer.content)
    if store.read_json(TOKENIZER_FILE) != content:
        store.write_json(TOKENIZER_FILE, content)


def saved_tokenizer(
    run_config: dict[str, Any], store: CheckpointStore | None = None, data_dir: str = ""
) -> Tokenizer | None:
    """Return the tokenizer that a state's config tells, with its file; None where it tells none.

    The file is that of the run's folder (store), else that of its dataset in data_dir.

    Raises:
        DataError: it is in neither, or damaged.
    """
    saved = run_config.get("tokenizer")
    if not saved:
        return None
    tokenizer = tokenizer_from_json(saved)
    if not isinstance(tokenizer, FileTokenizer) or tokenizer.content:
        return tokenizer
    if store and (content := store.read_json(TOKENIZER_FILE)):
        return tokenizer.with_file(json.dumps(content), store.path(TOKENIZER_FILE))
    name = str(run_config.get("dataset") or "")
    if data_dir and name and Path(data_dir, name, TOKENIZER_FILE).is_file():
        its = read_tokenizer(data_dir, name)
        if its == tokenizer:
            return its
    where = f"{store.path(TOKENIZER_FILE)} is missing or damaged" if store else "nothing tells where its file lies"
    raise DataError(
        f"the tokenizer is that of a {TOKENIZER_FILE} (SHA-256 {tokenizer.sha256[:12]}...): {where}; put it there, or "
        f"give the --data_dir in which its dataset {name} lies"
    )


def whole_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer's JSON value with its file in it, for a format that is one single file."""
    content = {"content": tokenizer.content} if isinstance(tokenizer, FileTokenizer) else {}
    return {**tokenizer.to_json(), **content}
