"""How a process of a job begins and ends: its rank, its device, its signals and its exit code."""
