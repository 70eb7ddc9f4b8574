"""TODO: what folded is."""
