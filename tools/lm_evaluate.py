"""Evaluate a checkpoint on tasks of lm-evaluation-harness: ``megalibi lm-eval`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("lm-eval")
