"""From text to batches: tokenizer, token files, datasets, loader.

Nothing is re-exported here: preprocessing workers import ``megalibi.data.tokenizer`` and must not pay for torch.
"""
