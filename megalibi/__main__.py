"""``python -m megalibi COMMAND``: the command line where the script ``megalibi`` is not on the path."""

from megalibi.cli.main import main

if __name__ == "__main__":
    main()
