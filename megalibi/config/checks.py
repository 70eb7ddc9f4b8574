"""The checks that several fields share, and the one form of their message: ``FIELD=VALUE: must be WHAT IS ALLOWED``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

from megalibi.errors import ConfigError

MAX_WHOLE_NUMBER = 2**63 - 1
MAX_SHOWN = 120
"""The most characters that a message shows of what it does not expect to be long."""
MAX_TEXT = 500
"""The most that it shows of a text, which may be a path."""


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """Return a text as a message shows it: never longer than a line or some, whatever stood in a file."""
    return text if len(text) <= limit else f"{text[: limit // 2]}... ({len(text):,} characters)"


def refuse(name: str, value: object, requirement: str) -> NoReturn:
    """Refuse the value of a field or of an option.

    Args:
        name: The field as section.field, or the option with its dashes.
        value: The value as the message shows it.
        requirement: What completes "must ...": "be at least 1".

    Raises:
        ConfigError: Always, with "NAME=VALUE: must REQUIREMENT".
    """
    raise ConfigError(f"{name}={shorten(str(value), MAX_TEXT)}: must {requirement}")


def check_at_least(section: str, minimum: float, **fields: float) -> None:
    """Refuse numbers that are below a minimum or not finite.

    Raises:
        ConfigError: With the field, its value and the minimum.
    """
    for name, value in fields.items():
        if not (math.isfinite(value) and value >= minimum):
            refuse(f"{section}.{name}", value, f"be at least {minimum}")


def check_at_most(section: str, maximum: float, **fields: float) -> None:
    """Refuse numbers above a maximum: those that no memory holds, or no library takes.

    Raises:
        ConfigError: With the field, its value and the maximum.
    """
    for name, value in fields.items():
        if value > maximum:
            refuse(f"{section}.{name}", value, f"be at most {maximum:,}")


def check_option(option: str, value: float | None, minimum: float) -> None:
    """Refuse a command's option that is below a minimum, not a number, or too large for 64 bits; None is not given.

    Raises:
        ConfigError: With the option, its value and what it must be.
    """
    if value is not None and not minimum <= value <= MAX_WHOLE_NUMBER:  # also true of a value that is not a number
        refuse(option, value, f"be at least {minimum}" + (" and fit into 64 bits" if value > minimum else ""))


def check_one_of(section: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is not among those listed.

    Raises:
        ConfigError: With the field, its value and the list.
    """
    choices = tuple(allowed)
    if value not in choices:
        listed = ", ".join(map(str, choices))
        refuse(f"{section}.{name}", value, f"be one of {listed}" if len(choices) > 1 else f"be {listed}")


def check_fraction(section: str, **fields: float) -> None:
    """Refuse numbers outside [0, 1).

    Raises:
        ConfigError: With the field, its value and the range.
    """
    for name, value in fields.items():
        if not 0.0 <= value < 1.0:
            refuse(f"{section}.{name}", value, "be at least 0 and below 1")
