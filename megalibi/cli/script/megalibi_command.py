"""``megalibi COMMAND`` as a file, which python, deepspeed, torchrun and srun all start by its path.

``python -m megalibi`` looks for the package in the current folder first, where a folder of that name, such as a clone
of the repository, hides the installed one. A script's own folder comes first in its place; this one has no other file,
so that no import finds here what it does not mean.
"""

import sys

from megalibi.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "megalibi"  # what a user would type is what a run records of its origin
    main()
