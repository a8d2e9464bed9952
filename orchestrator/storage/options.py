"""The setting `storage_options`: fsspec's options for out_dir's storage, among them secrets.

Options that you give inline never reach a file, a log or a message: only `redacted` writes down a run's settings.
Knows neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import ConfigError

GIVEN_INLINE = "(given inline)"
_RULE = 'a JSON object, {"key": "value"}, or the path of a .json file that holds one, on every node'


class StorageSettings(Protocol):
    """The settings of any command that opens a run's folder."""

    @property
    def out_dir(self) -> str: ...

    @property
    def storage_options(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Secret:
    """A text to pass on: whoever prints or stores the object does not show it."""

    text: str = dataclasses.field(repr=False)


def storage_options_of(config: StorageSettings, url: str | None = None) -> dict[str, Any] | None:
    """Return the fsspec options of out_dir, None where none are given.

    url: of something else to read or write. It has the options if it lies in the same kind of storage as out_dir or, if
        out_dir is on a disk, as init_from.

    Raises:
        ConfigError: storage_options holds no JSON object, or its file cannot be read; the value is not in the message.
    """
    text = config.storage_options.strip()
    if not text:
        return None
    home = _protocol(config.out_dir)
    if home == "file":
        home = _protocol(getattr(config, "init_from", ""))
    if url is not None and _protocol(url) not in (home, _protocol(config.out_dir)):
        return None
    return _with_home(_read(text) if is_options_file(text) else _parse(text, "storage_options"))


_read_from: dict[str, str] = {}  # options that came from a file, as JSON: its path


def read_again(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the present content of the file that these options came from; the same ones if there is no whole file."""
    path = _read_from.get(json.dumps(options, sort_keys=True, default=str))
    try:
        return _with_home(_read(path)) if path else options
    except ConfigError:  # it is being written
        return options


def redacted(config: Any) -> dict[str, Any]:
    """Return settings as a dictionary that may be stored and shown: it has no inline storage_options, only a path."""
    values = dataclasses.asdict(config)
    if values["storage_options"].strip() and not is_options_file(values["storage_options"].strip()):
        values["storage_options"] = GIVEN_INLINE
    return values


def is_options_file(text: str) -> bool:
    """Return whether it is a path, by its end: a bare secret, given by mistake, must not be shown as one."""
    return text.endswith(".json") and not text.startswith(("{", "["))


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"storage_options={path} cannot be read: {reason}; it must lie there on every node") from None
    options = _parse(text, f"storage_options={path}")
    _read_from[json.dumps(_with_home(options), sort_keys=True)] = path
    return options


def _with_home(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with ~ replaced in those that are files, such as a key's: no library does that."""

    def at_home(value: Any) -> Any:
        if not isinstance(value, str) or not value.startswith("~/"):
            return value
        try:
            path = Path(value).expanduser()
            return str(path) if path.is_file() else value
        except (OSError, RuntimeError, ValueError):  # it is something else
            return value

    return {key: at_home(value) for key, value in options.items()}


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:  # its message tells the place; the text itself may be a secret
        place = f" (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{where} is not JSON{place}: give {_RULE}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is no JSON object: give {_RULE}")
    return value


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"
