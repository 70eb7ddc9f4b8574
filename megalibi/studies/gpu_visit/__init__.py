"""TODO: what gpu_visit is."""
