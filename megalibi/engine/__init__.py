"""DeepSpeed: configuration, optimizer, step, evaluation."""
