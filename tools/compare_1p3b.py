"""Compare ALiBi with sinusoidal positions: ``megalibi study compare-1p3b`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("study compare-1p3b")
