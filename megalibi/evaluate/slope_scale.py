"""Position interpolation of ALiBi: slopes at evaluation that are a multiple of those of the training.

Beyond the training length L, ``interpolate`` multiplies the slopes by L / length (arXiv:2310.13017, "Position
Interpolation Improves ALiBi Extrapolation"), so that the farthest key has the bias that it had in training. A bias is
slope x distance: this is the same as all distances shrunk by that factor. Nothing that is saved or trained changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalibi.config import Config
from megalibi.errors import ConfigError

FACTOR_MIN, FACTOR_MAX = 1e-6, 1e6
"""The factors that are taken: with any other, slopes of a large model could be zero or infinite in fp32."""


@dataclass(frozen=True)
class SlopeScale:
    """What the slopes are multiplied by, at any length."""

    factor: float | None
    """The factor at every length; None: the training length divided by the length, and 1 up to the training length."""

    def at(self, length: int, train_seq_length: int) -> float:
        """Return the factor for a window.

        Args:
            length: Tokens that the model sees at once.
            train_seq_length: Tokens that it saw at once in training.
        """
        return min(1.0, train_seq_length / length) if self.factor is None else self.factor


def parse_slope_scale(text: str, option: str = "--slope-scale") -> SlopeScale | None:
    """Return what a user asks for by ``none``, ``interpolate`` or a number; None: the slopes of the training.

    Args:
        text: The value of the option.
        option: The option that names it.

    Raises:
        ConfigError: It is none of them.
    """
    if text in ("none", "interpolate"):
        return SlopeScale(None) if text == "interpolate" else None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not FACTOR_MIN <= factor <= FACTOR_MAX:  # false for NaN
        raise ConfigError(
            f"{option}={text}: must be none, interpolate or a number from {FACTOR_MIN:g} to {FACTOR_MAX:g}"
        )
    return SlopeScale(factor)


def check_slope_scale(config: Config, slope_scale: SlopeScale | None, option: str = "--slope-scale") -> None:
    """Check before the work that the model has slopes to scale.

    Args:
        config: The configuration of the checkpoint.
        slope_scale: What is to be done to the slopes.
        option: The option that names it.

    Raises:
        ConfigError: The position method is another one.
    """
    method = config.model.position_method
    if slope_scale is not None and method != "alibi":
        asked = "interpolate" if slope_scale.factor is None else f"{slope_scale.factor:g}"
        raise ConfigError(
            f"{option}={asked}: must be none with model.position_method={method} of the checkpoint: alibi alone has "
            "slopes"
        )
