"""The setting `storage_options`: what fsspec is told of out_dir's storage, secrets among it, and where that may go.

Nothing that is stored, logged or raised has the value of options that were given inline: a run's configuration is
written down by `public` only. Knows neither torch nor Ray.
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
class Hidden:
    """A text that is passed on, and not shown by what prints or stores whatever it is given."""

    text: str = dataclasses.field(repr=False)


def storage_options_of(config: StorageSettings, url: str | None = None) -> dict[str, Any] | None:
    """Return the fsspec options of out_dir, None where none are given.

    url: of something else that is read or written, which has the options where it lies in the same kind of storage;
        where out_dir is on a disk, which needs none, in that of init_from.

    Raises:
        ConfigError: storage_options holds no JSON object, or its file cannot be read; the value is not in the message.
    """
    text = config.storage_options.strip()
    home = _protocol(config.out_dir)
    if home == "file":
        home = _protocol(getattr(config, "init_from", ""))
    if not text or (url is not None and _protocol(url) not in (home, _protocol(config.out_dir))):
        return None
    if _is_file(text):
        return _parse(_read(text), f"storage_options={text}")
    return _parse(text, "storage_options")


def public(config: Any) -> dict[str, Any]:
    """Return a settings object as a dictionary that may be stored and shown: of storage_options, a file's path only."""
    values = dataclasses.asdict(config)
    if values["storage_options"].strip() and not _is_file(values["storage_options"].strip()):
        values["storage_options"] = GIVEN_INLINE
    return values


def _is_file(text: str) -> bool:
    """Return whether it is a path, going by its end: a secret that somebody gives as it is must not be shown as one."""
    return text.endswith(".json") and not text.startswith(("{", "["))


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"storage_options={path} cannot be read: {reason}; it must lie there on every node") from None


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
