"""Paths as users write them, in every command: we expand `~` and `file://`, and refuse oddities.

We store and pass on the expanded path: on a cluster `~` is the home folder of whoever starts the run. Knows no storage.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import ConfigError
from orchestrator.storage.options import is_options_file

PATH_KEYS = (
    *("out_dir", "data_dir", "init_from", "lora_base", "memory_dir", "storage_options"),
    *("to", "html", "text", "tokenizer", "start"),
)
_FOLDERS_OF_NODES = ("data_dir", "memory_dir")  # never in an object store
_MUST_BE_GIVEN = ("out_dir", "data_dir")
_FILE = "FILE:"  # nanoGPT's sign for a prompt that lies in a file
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_LOST_SLASH = re.compile(r"(s3a?|gcs|gs|abfss?|az|sftp|ssh|https?|file):/(?!/)")
_VARIABLE = re.compile(r"(?:^|(?<=[/:]))\$[A-Za-z_]\w*|\$\{[^}]*\}")
_PASSWORD = re.compile(r"://[^/]*:[^/]*@")

C = TypeVar("C")


def with_paths(config: C) -> C:
    """Return the settings with every path expanded.

    Raises:
        ConfigError: naming the key, the path and what is wrong with it.
    """
    keys = [field.name for field in dataclasses.fields(config) if field.name in PATH_KEYS]  # type: ignore[arg-type]
    return dataclasses.replace(config, **{key: _meant(key, getattr(config, key)) for key in keys})  # type: ignore[type-var]


def _meant(key: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_meant(key, each) for each in value)
    if key == "start":  # a prompt, if it is not said to be a file
        return _FILE + expanded(key, value.removeprefix(_FILE)) if value.startswith(_FILE) else value
    if key == "storage_options" and not is_options_file(value.strip()):  # nothing, or the options, which are secret
        return value
    return expanded(key, value)


def expanded(key: str, path: str) -> str:
    """Return the path or URL that the user means; key: the setting, for the message.

    Raises:
        ConfigError: nobody can mean it, or there is no such home folder.
    """
    path = _scheme_known(key, path)
    if path.startswith("~"):
        path = at_home(key, path)
    if not path and key in _MUST_BE_GIVEN:
        raise ConfigError(f"{key} is empty: give a folder; a dot is the one in which you are")
    if os.path.lexists(path):  # what is there under that very name is meant
        return path
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in path):
        raise ConfigError(f"{key}={path!r} holds a line end or another control character: leave it out")
    if path != path.strip():
        raise ConfigError(f"{key}={path!r} begins or ends with a blank: leave it out")
    if variable := _VARIABLE.search(path):
        raise ConfigError(
            f"{key}={path!r} holds {variable[0]}, which nobody has replaced: a shell does so where it stands in no "
            "single quotes, a settings file with os.environ"
        )
    return path


def _scheme_known(key: str, path: str) -> str:
    """Return the path of a file:// URL, and any other URL with its protocol in small letters."""
    if lost := _LOST_SLASH.match(path):
        rest = path[lost.end() :]
        if lost[1] == "file":  # file:/a/b is as good as file:///a/b
            return f"/{rest}"
        if not os.path.lexists(path):
            raise ConfigError(f"{key}={path!r} lacks a slash: {lost[1]}://{rest}")
    if not (found := _SCHEME.match(path)):
        return path
    scheme, rest = found[1].lower(), path[found.end() :]
    if scheme in ("file", "local"):
        return rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    if key in _FOLDERS_OF_NODES:
        raise ConfigError(f"{key}={path!r} is a URL: give a folder on a disk, at the same path on every node")
    if key in ("out_dir", "init_from", "lora_base", "to", "html", "compare") and _PASSWORD.search(
        path
    ):  # it would lie in files and in logs
        raise ConfigError(
            f"{key} holds a password: leave it out of the URL, storage takes it from the environment or a profile"
        )
    return f"{scheme}://{rest}"


def at_home(key: str, path: str) -> str:
    """Return a path that begins with ~ as the whole path that it stands for.

    Raises:
        ConfigError: there is no such home folder.
    """
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        user = path.partition("/")[0]
        who = f"no user has the name {user[1:]}" if user[1:] else "HOME is not set, and this user has no home folder"
        told = f"{key}={path!r}: {who}; give the whole path (a name that begins with ~ is written ./{user})"
        raise ConfigError(told) from None
