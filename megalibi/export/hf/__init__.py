"""Folders of Hugging Face: MPT, Bloom and Falcon, written from a checkpoint and read into one, without remote code."""
