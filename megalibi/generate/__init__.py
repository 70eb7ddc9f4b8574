"""Text from a trained model: sampling, and a cache of keys and values that keeps what a head can still see."""
