"""Measure what a machine with one GPU gives: ``megalibi study measure-gpu`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("study measure-gpu")
