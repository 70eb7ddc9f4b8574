"""TODO: what tokenizer is."""
