"""TODO: what triton is."""
