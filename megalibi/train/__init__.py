"""Training: what a run is and how it starts, the loop, its checkpoints and its records."""
