"""Checkpoints in the formats of other programs, out and in: consolidated safetensors, Hugging Face folders, GGUF."""
