"""Turn text into a token file: ``megalibi preprocess`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("preprocess")
