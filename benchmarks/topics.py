"""A dataset that needs nothing but Python: English of its manual, by characters."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from orchestrator.data.prepare import PrepareConfig, prepare


def prepare_topics(name: str, folder: Path) -> None:
    """Make it in a folder, under a name."""
    text = folder / "text.txt"
    text.write_text("\n".join(topics[topic] for topic in sorted(topics))[:100_000], encoding="utf-8")
    prepare(PrepareConfig(name, text=(str(text),), tokenizer="char", data_dir=str(folder)))
