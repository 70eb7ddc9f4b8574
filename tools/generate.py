"""Generate text from a checkpoint: ``megalibi generate`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("generate")
