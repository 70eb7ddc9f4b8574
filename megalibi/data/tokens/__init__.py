"""Token files: their format, the checks of their index, and what tells one from another."""
