"""`--key=value` flags and `--help`, by tyro."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from itertools import zip_longest
from typing import Annotated, Any


def files_and_flags(kind: Any, argv: Sequence[str]) -> list[tuple[bool, list[str]]]:
    """Cut argv into runs of settings files (True) and of flags, in order; a word after `--key` is that key's value.

    A setting that is on or off may have none: then it is True.
    """
    switches = {name for name, its_type in typing.get_type_hints(kind).items() if its_type is bool}
    runs: list[tuple[bool, list[str]]] = []
    awaits_value = False
    for word, following in zip_longest(argv, argv[1:]):
        is_switch = word.startswith("--") and word[2:].replace("-", "_") in switches
        if is_switch and following not in ("True", "False"):
            word = f"{word}=True"
        is_flag = word.startswith("-")
        is_file = not is_flag and not awaits_value
        awaits_value = is_flag and "=" not in word
        if not runs or runs[-1][0] is not is_file:
            runs.append((is_file, []))
        runs[-1][1].append(word)
    return runs


def read_flags(kind: Any, flags: list[str], values: dict[str, Any], prog: str, description: str | None) -> Any:
    """Return an instance of kind: values, and what flags set.

    Raises:
        SystemExit: 0 after `--help`; 2 after a wrong flag, which tyro has explained with the nearest one.
    """
    import tyro

    settings = kind(**values)
    if {"-h", "--help"} & set(flags):
        settings = _in_groups(settings)
    return tyro.cli(
        type(settings),
        args=flags,
        prog=prog,
        description=description,
        default=settings,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),  # --key=False, as in nanoGPT, instead of --no-key
    )


def _in_groups(settings: Any) -> Any:
    """Return the same settings as dataclasses in a dataclass, for tyro draws a box with a title around each of them.

    In the source of the class a comment on a line of its own begins a group, and the comment behind a key explains it.
    """
    import tyro

    kind = type(settings)
    hints = typing.get_type_hints(kind)
    groups: dict[str, Any] = {}
    keys: list[Any] = []
    for line in inspect.getsource(kind).splitlines():
        if title := re.fullmatch(r"    # (\w+)", line):
            keys = groups.setdefault(title[1], [])
        elif (key := re.fullmatch(r"    (\w+): .*?  # (.+)", line)) and groups:
            marks = tyro.conf.arg(help=key[2], prefix_name=False)
            keys.append((key[1], Annotated[hints[key[1]], marks], getattr(settings, key[1])))
    if not groups:
        return settings
    boxes = {title: dataclasses.make_dataclass(title, fields, frozen=True)() for title, fields in groups.items()}
    no_help = tyro.conf.arg(help="")
    outer = [(title, Annotated[type(box), no_help], box) for title, box in boxes.items()]
    return dataclasses.make_dataclass(kind.__name__, outer, frozen=True)()
