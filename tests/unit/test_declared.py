"""Every package that is imported is one that pyproject.toml declares: the tests' own would hide that one is missing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.support.installation import PROJECT, ROOT, closure, declared

OURS = {"orchestrator", "model"}
USERS_EXTRAS = [extra for extra in PROJECT["optional-dependencies"] if extra not in ("test", "dev")]


def imported(path: Path) -> Iterator[str]:
    """Yield the packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_every_import_is_declared() -> None:
    direct = {canonicalize_name(requirement.name) for requirement in declared(*USERS_EXTRAS)}
    brought_by = metadata.packages_distributions()
    modules = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    assert len(modules) > 50
    undeclared = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in imported(path)
        if name not in sys.stdlib_module_names | OURS
        and not direct & {canonicalize_name(distribution) for distribution in brought_by.get(name, [name])}
    }
    assert not undeclared


def test_what_only_tests_need_is_not_taken_for_declared() -> None:
    plain = closure(declared())
    assert {"torch", "ray", "transformers", "grpcio"} <= plain.keys(), "directly, and through ray[default]"
    assert not {"pytest", "s3fs", "wandb", "kubernetes-validate"} & plain.keys()
