"""Numbers as people read them: 12.3k tokens, 1.2 GB, 3m10s."""

from __future__ import annotations

import math

_COUNT_PREFIXES = ("", "k", "M", "B", "T")
_BYTE_PREFIXES = ("B", "KB", "MB", "GB", "TB", "PB")


def _scaled(value: float, num_prefixes: int) -> tuple[float, int]:
    """Divide by 1000 until the value is printed as less than 1000; return it and the number of divisions."""
    exponent = 0
    while abs(value) >= 999.95 and exponent < num_prefixes - 1:
        value /= 1000
        exponent += 1
    return value, exponent


def format_count(value: float) -> str:
    """Abbreviate a count in powers of 1000: 12.3k, 125.2M, 1.3B."""
    if not math.isfinite(value):
        return str(value)
    scaled, exponent = _scaled(value, len(_COUNT_PREFIXES))
    if exponent == 0 and scaled == int(scaled):
        return str(int(scaled))
    return f"{scaled:.1f}{_COUNT_PREFIXES[exponent]}"


def format_bytes(num_bytes: float) -> str:
    """Abbreviate a size in bytes in powers of 1000: 1.2 GB."""
    scaled, exponent = _scaled(num_bytes, len(_BYTE_PREFIXES))
    return f"{scaled:.0f} B" if exponent == 0 else f"{scaled:.1f} {_BYTE_PREFIXES[exponent]}"


def format_duration(seconds: float) -> str:
    """Write a duration with its two largest units: 42s, 3m10s, 2h05m, 4d07h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
