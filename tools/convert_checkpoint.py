"""Write a checkpoint anew, for another topology or program, or from one: ``megalibi convert`` as a script."""

from megalibi.cli.main import start_script

if __name__ == "__main__":
    start_script("convert")
