"""DeepSpeed around the GPT: configuration, optimizer, step and evaluation."""
