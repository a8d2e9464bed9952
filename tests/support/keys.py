"""A file of AWS keys."""

from __future__ import annotations

from pathlib import Path


def write_keys(path: Path, key: str, secret: str) -> None:
    text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
