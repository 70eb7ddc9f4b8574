"""Tokenizers: a sentencepiece model or a list of words, and the training of one."""
