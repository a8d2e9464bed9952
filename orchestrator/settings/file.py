"""Settings files: plain Python that assigns keys, nanoGPT's own files included.

We run a file and look at the names that it leaves behind. A mistake is told with its line.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import traceback
import typing
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import ConfigError, nearest
from orchestrator.settings.bounds import bounds_of
from orchestrator.storage.paths import at_home

_VALUES = (bool, int, float, str, list, tuple, dict, type(None))  # types that look like a setting, unlike a module


def read_settings(kind: Any, word: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a settings file and return the keys that it sets; it sees the values that stand so far, as in nanoGPT.

    Raises:
        ConfigError: naming the file, its line, the key, the value and the nearest valid key.
    """
    path = Path(at_home("settings file", word) if word.startswith("~") else word)
    types, bounds = typing.get_type_hints(kind), bounds_of(kind)
    scope = {f.name: f.default for f in dataclasses.fields(kind)} | values
    before = dict(scope)
    lines, passing = _bindings(_run(path, scope))
    settings = {}
    for key, value in scope.items():
        where = f"{path}, line {lines.get(key, 1)}: "
        if key not in types and not key.startswith("_") and isinstance(value, _VALUES) and key not in passing:
            hint = nearest(key, types)
            raise ConfigError(
                f"{where}{key}={_shown(value)}: no such setting{hint} (a variable of your own starts with _)"
            )
        if key in types and value is not before[key]:
            settings[key] = _of_type(types[key], value, f"{where}{key}")
            if key in bounds:
                bounds[key].check(key, settings[key], where)
    return settings


def _run(path: Path, scope: dict[str, Any]) -> str:
    """Run a settings file in a scope and return its text.

    Raises:
        ConfigError: the file is missing, or one of its lines fails.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        word = str(path).partition("{")[0]  # storage_options may hold secrets
        hint = f"; did you mean --{word}?" if "=" in word else hint
        raise ConfigError(f"settings file {word} does not exist{hint}")
    try:
        source = path.read_text(encoding="utf-8")
        exec(compile(source, str(path), "exec"), scope)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{_line_in(error, path)} cannot be read: {error}") from None
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # the file is the user's program, and may raise anything
        raise ConfigError(f"{path}{_line_in(error, path)}: {type(error).__name__}: {error}") from None
    return source


def _shown(value: Any) -> str:
    """Return a wrong value for a message; of several in one the kind only: storage_options may be, with its secrets."""
    return f"<{type(value).__name__}>" if isinstance(value, dict | list | tuple) or "{" in str(value) else repr(value)


def _line_in(error: BaseException, path: Path) -> str:
    """Return the line of the settings file at which it failed, nothing where it did not get as far."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _bindings(source: str) -> tuple[dict[str, int], set[str]]:
    """Return the last line that binds each name of a settings file, and the names that it only binds in passing.

    Those are of a loop, a `with`, a walrus: nothing is assigned to them.
    """
    assigned: set[str] = set()
    lines: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        else:
            targets = []
        assigned |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 1))
    return lines, lines.keys() - assigned


def _of_type(wanted: Any, value: Any, where: str) -> Any:
    """Return value in the setting's type: an int will do for a float, 6e5 for an int, True for neither."""
    options = typing.get_args(wanted) or (wanted,)
    if typing.get_origin(wanted) is Literal:
        if value in options:
            return value
        raise ConfigError(f"{where}={value!r} is none of {', '.join(options)}{nearest(str(value), options)}")
    for option in options:
        if type(value) is option:
            return value
        if type(value) in (int, float) and option in (int, float) and value == option(value):
            return option(value)
    names = " or ".join(option.__name__ for option in options)
    raise ConfigError(f"{where}={_shown(value)} should be of type {names}")
