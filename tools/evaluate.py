"""Evaluate a checkpoint at several lengths: ``megalibi evaluate`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("evaluate")
