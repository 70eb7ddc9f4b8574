"""TODO: what bench is."""
