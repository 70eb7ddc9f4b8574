"""What DeepSpeed allocates and sends, replayed without a GPU: one module for each kind of ZeRO stage.

version.py names the version of DeepSpeed that is replayed.
"""
