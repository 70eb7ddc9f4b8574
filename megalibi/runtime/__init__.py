"""How a process begins and ends: its rank, its device, the files it will write, its signals and its exit code."""
