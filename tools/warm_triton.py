"""Compile the Triton kernels of attention ahead: ``megalibi warm-triton`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("warm-triton")
