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
    """A condition that a setting's value must meet, and the words for it in an error."""

    rule: str
    holds: Callable[[Any], bool]

    def check(self, key: str, value: Any, where: str = "") -> None:
        """Check a key's value; None is always in range.

        Raises:
            ConfigError: naming where, the key, the value and the rule.
        """
        if value is not None and not self.holds(value):
            raise ConfigError(f"{where}{key}={value!r} is out of range: {self.rule}")


AT_LEAST_0 = Bound("0 or more", lambda x: 0 <= x < math.inf)
AT_LEAST_1 = Bound("1 or more", lambda x: x >= 1)
POSITIVE = Bound("more than 0", lambda x: 0 < x < math.inf)

PositiveInt = Annotated[int, AT_LEAST_1]
NonNegativeInt = Annotated[int, AT_LEAST_0]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeFloat = Annotated[float, AT_LEAST_0]
Fraction = Annotated[float, Bound("from 0 up to, not including, 1", lambda x: 0 <= x < 1)]
Seed = Annotated[int, Bound("from 0 to 2**64 - 1", lambda x: 0 <= x < 2**64)]
FailureLimit = Annotated[int, Bound("-1 (no limit) or more", lambda x: x >= -1)]


def bounds_of(kind: Any) -> dict[str, Bound]:
    """Return key -> bound for the fields of a dataclass that have one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    annotations = {key: getattr(hint, "__metadata__", ()) for key, hint in hints.items()}
    return {key: bound for key, found in annotations.items() for bound in found if isinstance(bound, Bound)}
