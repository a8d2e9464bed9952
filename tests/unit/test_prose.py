"""README and docs address the reader, hang few clauses on pronouns, and name only things that exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
PERSONS = ("you", "your", "we", "our", "us")
PRONOUNS = ("that", "which", "who", "whose", "what", "where")
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose_of(page: Path) -> str:
    """Return a page without code: neither blocks nor names and messages in backticks."""
    return re.sub(r"`[^`\n]*`", " ", re.sub(r"```.*?```", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL))


def per_1000_words(pages: list[Path], words: tuple[str, ...]) -> float:
    found = Counter(word.lower() for page in pages for word in re.findall(r"[A-Za-z]+", prose_of(page)))
    return 1000 * sum(found[word] for word in words) / found.total()


def test_readers_are_addressed_and_clauses_do_not_hang_on_pronouns() -> None:
    assert per_1000_words(PAGES[:-1], PERSONS) >= 12
    assert per_1000_words(PAGES[:-1], PRONOUNS) <= 24


def headings_of(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        link = target[0] or target[1]
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), link
        assert not anchor or anchor in headings_of(linked), link


@by_name
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:orchestrator|model|benchmarks|tests|configs|deploy|docs)/[\w./-]*)`", page.read_text(encoding="utf-8")
    )
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


@by_name
def test_tests_that_are_named_are_there(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")) if named else ""
    missing = [name for name in named if f"def {name}(" not in sources]
    assert not missing


@by_name
def test_benchmarks_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"python -m benchmarks (\w+)", page.read_text(encoding="utf-8"))
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py")}
    missing = [name for name in named if "def add_arguments(" not in files.get(name, "")]
    assert not missing
