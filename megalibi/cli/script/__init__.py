"""The command line as a file, which our own processes are started with by its path; nothing else may stand here."""
