"""Types for settings with a range. They annotate a dataclass's fields; to a type checker they are plain numbers."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any

from orchestrator.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bound:
    """The values that a setting may have: numbers from `low` up to, not including, `below`; or those for which `holds`.

    rule: the same in words, for an error.
    """

    rule: str
    low: float = -math.inf
    below: float = math.inf
    holds: Callable[[Any], object] | None = None

    def check(self, key: str, value: Any, where: str = "") -> None:
        """Check a key's value; None is always in range.

        Raises:
            ConfigError: naming where, the key, the value and the rule.
        """
        if value is None:
            return
        if not (self.holds(value) if self.holds else self.low <= value < self.below):
            raise ConfigError(f"{where}{key}={value!r} is out of range: {self.rule}")


AT_LEAST_0 = Bound("0 or more", low=0)
AT_LEAST_1 = Bound("1 or more", low=1)
POSITIVE = Bound("more than 0", low=math.ulp(0.0))  # the smallest number that is

PositiveInt = Annotated[int, AT_LEAST_1]
NonNegativeInt = Annotated[int, AT_LEAST_0]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeFloat = Annotated[float, AT_LEAST_0]
Fraction = Annotated[float, Bound("from 0 up to, not including, 1", low=0, below=1)]
Seed = Annotated[int, Bound("from 0 to 2**64 - 1", low=0, below=2**64)]
FailureLimit = Annotated[int, Bound("-1 (no limit) or more", low=-1)]


def bounds_of(kind: Any) -> dict[str, Bound]:
    """Return key -> bound for the fields of a dataclass that have one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    annotations = {key: getattr(hint, "__metadata__", ()) for key, hint in hints.items()}
    return {key: bound for key, found in annotations.items() for bound in found if isinstance(bound, Bound)}
