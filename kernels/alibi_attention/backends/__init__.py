"""The back ends: each computes the same attention by other means; backend.py says what one must state and do."""
