"""Token files in Megatron-LM's indexed format, samples drawn from them, and the tokenizer."""
