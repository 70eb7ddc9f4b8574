"""TODO: what vocabulary is."""
