"""Evaluation of a checkpoint: losses by length and position, and the lm-evaluation-harness."""
