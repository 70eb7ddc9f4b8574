"""Position methods."""
