"""The ends of the model: the loss over the vocabulary, and adaptive embeddings and softmax."""
