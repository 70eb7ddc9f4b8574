"""A folder of Hugging Face as a checkpoint of ours."""
