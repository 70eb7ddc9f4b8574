"""Checkpoints that survive a crash at any moment."""
