"""Commands of a trained model: what it knows by its losses and by tasks, and what it says."""
