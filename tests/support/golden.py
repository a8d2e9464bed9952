"""A checkpoint that nanoGPT wrote, and its numbers; a module that imports this is skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.data.nanogpt_meta import read_nanogpt_meta

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CKPT = GOLDEN / "nanogpt_ckpt.pt"
if not CKPT.is_file():
    pytest.skip(f"nanoGPT's recorded checkpoint is not at {GOLDEN}", allow_module_level=True)

NUMBERS = json.loads(CKPT.with_suffix(".json").read_text())
EVAL_LOSS, GREEDY = NUMBERS["eval"]["loss"], NUMBERS["greedy_from_token_0_80_new"]
CHARS = "".join(read_nanogpt_meta(GOLDEN / "nanogpt_meta.pkl")["stoi"])
_TEXT = (GOLDEN.parent / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
EVAL_ROWS = [[CHARS.index(character) for character in _TEXT[b * 997 : b * 997 + 33]] for b in range(8)]
