"""DeepSpeed's buffers, replayed without a GPU: one module for each kind of ZeRO stage."""
