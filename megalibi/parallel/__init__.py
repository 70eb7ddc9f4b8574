"""Tensor parallelism over torch.distributed: groups, collectives, sharded layers, loss and random states."""
