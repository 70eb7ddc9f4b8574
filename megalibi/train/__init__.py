"""Training: the job's parts, the loop, and what is written of it."""
