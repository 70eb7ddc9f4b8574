"""DeepSpeed around the GPT: its configuration, the optimizer, the engine and one training step."""
