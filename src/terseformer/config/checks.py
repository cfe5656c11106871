"""What a configuration checks of itself."""

from __future__ import annotations

import math
from collections.abc import Callable

from terseformer.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that a user can mend: the message says which key, what was given, what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with this message if the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    """Raises ConfigError if one number does not divide the other."""
    require(of > 0 and value % of == 0, f"{name} = {value} is not a multiple of {of_name} = {of}; change one of them")


def require_ranges(section: str, config: object, **ranges: tuple[str, ...]) -> None:
    """Raises ConfigError if a field lies outside the range, of those in `_RANGES`, that it is given for."""
    for kind, names in ranges.items():
        is_within, words = _RANGES[kind]
        for name in names:
            value = getattr(config, name)
            require(value is None or is_within(value), f"{section}.{name} must {words}, not {value}")


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "count": (lambda value: value >= 1, "be at least 1"),
    "zero_or_more": (lambda value: 0 <= value < math.inf, "be at least 0"),
    "positive": (lambda value: 0 < value < math.inf, "be above 0"),
    "share": (lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    "share_below_one": (lambda value: 0 <= value < 1, "lie in [0, 1)"),
    "odd": (lambda value: value >= 1 and value % 2 == 1, "be odd"),
}
