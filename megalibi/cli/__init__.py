"""The command line: ``megalibi COMMAND``, a file for each command, which parses, calls the packages and prints."""
