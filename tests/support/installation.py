"""What a plain `pip install` of this project brings, read from the metadata of what is installed here."""

from __future__ import annotations

import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(*extras: str) -> list[Requirement]:
    """Return the requirements that pyproject.toml declares, with those of extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def closure(requirements: Sequence[Requirement]) -> dict[str, metadata.Distribution]:
    """Return the distributions that these requirements bring, and what those require, by name."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(wanted, extra) for wanted in requirements for extra in ("", *wanted.extras)]
    while waiting:
        wanted, extra = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = metadata.distribution(name)
        for needed in map(Requirement, found[name].requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed, more) for more in ("", *needed.extras)]
    return found


def plain_environment(folder: Path) -> Path:
    """Make an environment that has this checkout and what it declares, less the extras; return its Python.

    Its packages are links to those of the environment that runs the tests.
    """
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for distribution in closure(declared()).values():
        for entry, place in _top_level(distribution):
            if not (site / entry).exists():
                (site / entry).symlink_to(place)
    (site / "checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    return folder / "bin" / "python"


def _top_level(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """Yield the names and places of a distribution's packages, modules and metadata."""
    for entry in sorted({file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}):
        yield entry, Path(str(distribution.locate_file(entry)))
