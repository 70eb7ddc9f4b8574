"""Measure one thing of a device: ``megalibi study measure-device`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("study measure-device")
