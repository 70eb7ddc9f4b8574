"""A checkpoint as a file of llama.cpp: what its architectures can hold, the file, and running it."""
