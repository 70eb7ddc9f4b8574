"""Evaluation of a checkpoint: losses by length and by position, and the tasks of lm-evaluation-harness."""
