"""What a run is: frozen dataclasses, their loading from YAML, and what follows from them. No torch here."""

from megalibi.config.errors import ConfigError

__all__ = ["ConfigError"]
