"""What several fields are checked for; the error names field, value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megalibi.errors import ConfigError

MAX_WHOLE_NUMBER = 2**63 - 1


def check_at_least(section: str, minimum: float, **fields: float) -> None:
    """Refuse numbers below a minimum, or none."""
    for name, value in fields.items():
        if not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name}={value} is not allowed: a number of at least {minimum} is")


def check_at_most(section: str, maximum: float, **fields: float) -> None:
    """Refuse numbers above a maximum: those that no memory holds, or no library takes."""
    for name, value in fields.items():
        if value > maximum:
            raise ConfigError(f"{section}.{name}={value} is not allowed: a number of at most {maximum:,} is")


def check_option(option: str, value: float | None, minimum: float) -> None:
    """Refuse what an option of a command cannot be: below a minimum, no number, or of more than 64 bits."""
    if value is not None and not minimum <= value <= MAX_WHOLE_NUMBER:  # false for a value that is no number
        raise ConfigError(f"{option}={value} is not allowed: a number of at least {minimum} is")


def check_one_of(section: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse what is not listed."""
    if value not in allowed:
        raise ConfigError(f"{section}.{name}={value} is not allowed: one of {', '.join(map(str, allowed))} is")


def check_fraction(section: str, **fields: float) -> None:
    """Refuse what is not in [0, 1)."""
    for name, value in fields.items():
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"{section}.{name}={value} is not allowed: a number from 0 up to, but not, 1 is")
