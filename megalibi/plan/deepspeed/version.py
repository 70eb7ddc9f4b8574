"""The version of DeepSpeed that the modules beside this one replay, and what to say when another one is installed."""

from __future__ import annotations

from importlib.metadata import version

REPLAYED_VERSION = "0.19.8"
"""The version whose code was read, and to which tests hold the replay byte for byte."""


def describe_other_version(installed: str | None = None) -> str | None:
    """Return one line that says what a plan is worth with another version, or None with the replayed one.

    Args:
        installed: The version of DeepSpeed that will run the training; None means the one that is installed here.
    """
    installed = version("deepspeed") if installed is None else installed
    if installed.partition("+")[0] == REPLAYED_VERSION:
        return None
    return (
        f"memory and communication are planned as DeepSpeed {REPLAYED_VERSION} has them, and {installed} is installed: "
        "what ZeRO allocates and sends may differ"
    )
