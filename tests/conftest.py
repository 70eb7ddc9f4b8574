from __future__ import annotations

import signal

import tests.device
import tests.flash_attn_on_cpu  # noqa: F401 - before alibi_attention, which asks it for its operators


def pytest_configure() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that: tests send SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
