"""The tensors of a checkpoint: the files that hold them, of every format, and how they are put together."""
